"""What a part of the bench finds, what all parts are given, and the table for people."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.measure import Setting

PEER = "bitsandbytes"

Figure = float | bool | None


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What the parts have in common.

    Attributes:
        python: the peer's interpreter; None measures ours alone.
        setting: of the part ``step``; its shape too.
        load_shape: of the part ``load``.
        limit: on the memory of the part ``big``, as ``--max-memory`` takes it.
        rounds: of runs that are processes of their own; single operations take ``turns``.
        seconds: how long one operation is measured at a time.
    """

    work: Path
    env: Mapping[str, str] = field(repr=False)
    peer_env: Mapping[str, str] = field(repr=False)
    python: Path | None
    data: Path
    setting: Setting
    load_shape: str
    weights: tuple[tuple[int, int], ...]
    values: int
    limit: str
    rounds: int
    seconds: float
    say: Callable[[str], None]

    @property
    def turns(self) -> int:
        """Rounds of single operations: short, so that each round is easily disturbed, and cheap."""
        return 3 * self.rounds

    @property
    def runs(self) -> Path:
        """Where processes leave what they say."""
        return self.work / "runs-quant"


@dataclass
class Findings:
    """Of one part.

    Attributes:
        figures: what the JSON line has at its top, by stable names; None where a system did not run.
        details: every cell, round by round.
        not_run: system → why. Ours among them makes the bench fail.
    """

    figures: dict[str, Figure] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    not_run: dict[str, str] = field(default_factory=dict)


def ratio(over: Sequence[float], under: Sequence[float]) -> float | None:
    """The median over the rounds of ``over / under`` within a round, with three digits; None where one did not run.

    Within a round, because what else the machine does changes from one to the next, and for both alike.
    """
    if not over or not under:
        return None
    return float(f"{statistics.median(a / b for a, b in zip(over, under, strict=True)):.3g}")


def each(name: str, rounds: Sequence[object]) -> list[float]:
    """One attribute of every round."""
    return [getattr(one, name) for one in rounds]


def least(ratios: Iterable[float | None]) -> float | None:
    """The worst of them; None where one could not be formed."""
    found = list(ratios)
    return min((r for r in found if r is not None), default=None) if None not in found else None


# What the product means to reach: figure → (at least, or at most; that).
AIMS: dict[str, tuple[str, float]] = {
    "quantize_speedup_vs_bitsandbytes": ("≥", 15.0),
    "dequantize_speedup_vs_bitsandbytes": ("≥", 1.0),
    "dequantize_reference_speedup_vs_naive": ("≥", 20.0),
    "optim_speedup_vs_bitsandbytes": ("≥", 5.0),
    "optim_reference_speedup_vs_bitsandbytes": ("≥", 2.0),
    "load_s": ("≤", 4.0),
    "load_anonymous_mb": ("≤", 1000.0),
    "packed_load_s": ("≤", 1.0),
    "step_time_ratio_nf4": ("≤", 1.12),
    "step_time_ratio_int8": ("≤", 0.9),
    "step_speedup_vs_bitsandbytes": ("≥", 4.0),
    "step_memory_ratio_vs_bitsandbytes": ("≥", 8.0),
    "big_peak_mb": ("≤", 5500.0),
    "big_limited_peak_mb": ("≤", 2000.0),
    "big_limited_time_ratio": ("≤", 1.5),
    "big_limited_same_adapter": ("≥", 1.0),
}


def missed(figures: Mapping[str, Figure]) -> list[str]:
    """The figures that don't reach their aim; what was not measured is not among them."""
    known = ((name, value, *AIMS[name]) for name, value in figures.items() if name in AIMS and value is not None)
    return [name for name, value, sign, aim in known if (value < aim if sign == "≥" else value > aim)]


def table(figures: Mapping[str, Figure]) -> str:
    """A line per figure, and its aim where it has one."""
    lines = [f"{'figure':<54}{'here':>12}  aim"]
    for name, value in figures.items():
        shown = "–" if value is None else ("yes" if value else "no") if isinstance(value, bool) else f"{value:,g}"
        sign, aim = AIMS.get(name, ("", 0.0))
        lines.append(f"{name:<54}{shown:>12}  {f'{sign} {aim:,g}' if sign and not isinstance(value, bool) else ''}")
    return "\n".join(line.rstrip() for line in lines)
