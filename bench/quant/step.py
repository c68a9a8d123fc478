"""The part ``step``: LoRA training on a dense and on quantised bases, each run a process of its own, by turns."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from bench.environments import PEERS
from bench.measure import WARM_STEPS, Outcome, Setting, medians
from bench.quant.findings import PEER, Bench, Figure, Findings, each, ratio
from bench.quant.rounds import by_rounds
from bench.report import OURS, rounded
from bench.runs import Runs

# What our command gets beside the setting; and whether the peer's layers are recomputed in the backward.
FLAGS: dict[str, list[str]] = {"bf16": [], "nf4": ["--quant", "nf4", "--double-quant"], "int8": ["--quant", "int8"]}
CHECKPOINTING = f"{PEER}_checkpointing"
PEER_RUNS = {PEER: False, CHECKPOINTING: True}
# What the others are held against, and what is held against the peer: its base is in NF4 too.
DENSE, COMPARED = "bf16", "nf4"


@dataclass(frozen=True, kw_only=True)
class PeerSetting(Setting):
    """What ``bench/peers/peft_trainer.py`` reads beside the common setting."""

    quant: str = "nf4"
    checkpointing: bool = False


@dataclass(frozen=True, kw_only=True)
class QuantRuns(Runs):
    """Runs of one variant: of ours with further flags, or of the peer in the interpreter that is given."""

    flags: tuple[str, ...] = ()
    python: Path | None = None

    def _command(self, system: str, folder: Path, log: Path, steps: int) -> list[str]:
        if system == OURS:
            return [*super()._command(system, folder, log, steps), *self.flags]
        task = self._task(system) | {"out": folder / "out", "log": log, "steps": steps}
        file = folder / "task.json"
        file.write_text(json.dumps(task, default=str), encoding="utf-8")
        return [str(self.python), str(PEERS / "peft_trainer.py"), str(file)]


def step(bench: Bench) -> Findings:
    """Ours in bf16, on nf4 and on int8; PEFT, Trainer and bitsandbytes on nf4, keeping or recomputing activations."""
    common = shared(bench)
    common.prepare([], bench.say)
    folder, found = bench.runs / "step", Findings()
    shutil.rmtree(folder, ignore_errors=True)

    def training(name: str, system: str, own: QuantRuns) -> Callable[[int], Outcome]:
        return lambda turn: own.one(system, folder / f"{turn}-{name}", steps=None if turn else WARM_STEPS + 1)

    systems = {name: training(name, *one) for name, one in variants(common, bench).items()}
    runs = by_rounds(bench, systems, _line, found.not_run)
    found.figures = figures(runs)
    found.details = {name: [rounded(one) for one in rounds] for name, rounds in runs.items()}
    found.details["tokens"] = common.tokens[0]
    return found


def shared(bench: Bench) -> QuantRuns:
    """What all variants have in common: the model and its rows."""
    return QuantRuns(
        setting=bench.setting, work=bench.work, environments=bench.work, data=bench.data, recompute=None,
        env=bench.env, python=bench.python,
    )  # fmt: skip


def variants(common: QuantRuns, bench: Bench) -> dict[str, tuple[str, QuantRuns]]:
    """Name → who runs it, and how."""
    runs = {name: (OURS, replace(common, flags=tuple(flags))) for name, flags in FLAGS.items()}
    for name, checkpointing in PEER_RUNS.items() if bench.python is not None else ():
        setting = PeerSetting(**asdict(bench.setting), checkpointing=checkpointing)
        runs[name] = (PEER, replace(common, setting=setting, env=bench.peer_env))
    return runs


def figures(runs: Mapping[str, Sequence[Outcome]]) -> dict[str, Figure]:
    """Those ``vs`` the peer are above 1 in our favour; the other ratios are over our own bf16 runs.

    Args:
        runs: of each that ran, round by round.
    """

    def between(name: str, over: str, under: str) -> float | None:
        return ratio(each(name, runs.get(over, [])), each(name, runs.get(under, [])))

    ours = medians(runs[COMPARED]) if COMPARED in runs else None
    found: dict[str, Figure] = {
        f"step_{name}_{COMPARED}": None if ours is None else round(getattr(ours, name), 2)
        for name in ("tok_s", "peak_mb")
    }
    for name in FLAGS:
        if name != DENSE:
            found[f"step_time_ratio_{name}"] = between("tok_s", DENSE, name)
            found[f"step_memory_ratio_{name}"] = between("peak_mb", name, DENSE)
    for name in PEER_RUNS:
        found[f"step_speedup_vs_{name}"] = between("tok_s", COMPARED, name)
        found[f"step_memory_ratio_vs_{name}"] = between("peak_mb", name, COMPARED)
    return found


def _line(one: Outcome) -> str:
    return (
        f"{one.tok_s:8,.1f} tok/s  peak {one.peak_mb:7,.0f} MB  first step "
        f"{one.first_step_s:5.1f} s  loss {one.loss:.4f}"
    )
