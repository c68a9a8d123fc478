"""What was found, as figures, as a table for people, and against what the product means to reach."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bench.methods.turns import FILES, LORA, PEER, Found
from bench.quant.findings import Figure, ratio
from bench.report import OURS

CPU = "cpu_seconds"
# Figure → (at least, or at most; that). A speed-up over the peer is to be at least 1 in every method.
AIMS: dict[str, tuple[str, float]] = {
    "dora_time_ratio_vs_lora": ("≤", 1.15), "adapter_save_s": ("≤", 1.0), "adapter_load_s": ("≤", 1.0),
}  # fmt: skip


def figures(found: Sequence[Found]) -> dict[str, Figure]:
    """Of all methods: each ratio is taken within a round, and the median of those counts.

    Times of ratios are the processor's; ``tok_s`` goes by the clock. Ratios ``vs_peft`` are above 1 in our favour.
    """
    top: dict[str, Figure] = {}
    for one in found:
        top |= _of_files(one) if one.name == FILES else _of_steps(one)
    return top


def _of_steps(one: Found) -> dict[str, Figure]:
    name, median = one.name.replace("-", "_"), _median
    seconds = median(one, OURS, "seconds")
    found: dict[str, Figure] = {
        f"{name}_tok_s": None if seconds is None else round(one.tokens / seconds, 1),
        f"{name}_peak_mb": median(one, OURS, "peak_mb"),
        f"{name}_trained": median(one, OURS, "trained"),
    }
    if one.name != "lora":
        found[f"{name}_time_ratio_vs_lora"] = ratio(one.each(OURS, CPU), one.each(LORA, CPU))
    if PEER in one.rounds or PEER in one.not_run:
        found |= {
            f"{name}_speedup_vs_peft": ratio(one.each(PEER, CPU), one.each(OURS, CPU)),
            f"{name}_memory_ratio_vs_peft": ratio(one.each(PEER, "peak_mb"), one.each(OURS, "peak_mb")),
            f"{name}_same_trained": _same_trained(one),
        }
    return found


def _same_trained(one: Found) -> bool | None:
    counts = {count for system in (OURS, PEER) for count in one.each(system, "trained")}
    return len(counts) == 1 if one.each(PEER, "trained") and one.each(OURS, "trained") else None


def _of_files(one: Found) -> dict[str, Figure]:
    found: dict[str, Figure] = {}
    for job in ("save", "load"):
        found[f"adapter_{job}_s"] = _median(one, f"{OURS} {job}", "seconds")
        theirs = one.each(f"{PEER} {job}", CPU)
        found[f"adapter_{job}_speedup_vs_peft"] = ratio(theirs, one.each(f"{OURS} {job}", CPU))
    found["adapter_mb"] = _median(one, f"{OURS} save", "mb")
    return found


def missed(top: Mapping[str, Figure], found: Sequence[Found]) -> list[str]:
    """The figures that don't reach their aim; what was not measured is not among them."""
    aims = AIMS | {f"{one.name.replace('-', '_')}_speedup_vs_peft": ("≥", 1.0) for one in found}
    known = ((name, value, *aims[name]) for name, value in top.items() if name in aims and value is not None)
    slow = [name for name, value, sign, aim in known if (value < aim if sign == "≥" else value > aim)]
    return slow + [name for name, value in top.items() if name.endswith("_same_trained") and value is False]


def table(found: Sequence[Found]) -> str:
    """A line per method: ours, the peer's, and how we are to each other."""
    lines = [
        f"{'method':<15}{'tok/s':>9}{'x PEFT':>8}{'x LoRA':>8}{'peak MB':>9}{'PEFT MB':>9}{'trained':>11}{'PEFT':>11}"
    ]
    for one in found:
        if one.name == FILES:
            continue
        top = {key.removeprefix(f"{one.name.replace('-', '_')}_"): value for key, value in _of_steps(one).items()}
        lines.append(
            f"{one.name:<15}{_shown(top['tok_s']):>9}{_shown(top.get('speedup_vs_peft'), '.2f'):>8}"
            f"{_shown(top.get('time_ratio_vs_lora'), '.2f'):>8}{_shown(top['peak_mb']):>9}"
            f"{_shown(_median(one, PEER, 'peak_mb')):>9}{_shown(top['trained']):>11}"
            f"{_shown(_median(one, PEER, 'trained')):>11}"
        )
    for one in found:
        if one.name == FILES:
            lines += [f"{name:<32}{_shown(value, '.3g'):>8}" for name, value in _of_files(one).items()]
    return "\n".join(line.rstrip() for line in lines)


def _median(one: Found, system: str, what: str) -> float | None:
    rounds = one.each(system, what)
    return float(f"{statistics.median(rounds):.7g}") if rounds else None


def _shown(value: Any, form: str = ",.0f") -> str:
    return "–" if value is None else format(value, form)
