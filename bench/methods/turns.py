"""Ours and the peer's processes, asked by turns for some steps of a method, or for an adapter's files."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.methods.pairs import Pair, Setting, pairs
from bench.report import OURS
from bench.workers import Answers, Asked, Worker, by_turns

PEER, LORA = "peft", "truetune lora"
FILES = "files"


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all methods have in common.

    Attributes:
        python: the peer's interpreter; None measures ours alone.
        seconds: how long a system's steps are measured at a time.
    """

    setting: Setting
    env: Mapping[str, str] = field(repr=False)
    peer_env: Mapping[str, str] = field(repr=False)
    python: Path | None
    folder: Path
    rounds: int
    seconds: float
    say: Callable[[str], None]

    def ours(self, name: str) -> Worker:
        """A process of ours, which keeps what it says under that name."""
        return Worker(name, [sys.executable, "-m", "bench.methods.ours"], self.env, self.folder)

    def theirs(self, name: str) -> Worker:
        """The same of the peer's."""
        return Worker(name, [str(self.python), "-m", "bench.methods.theirs"], self.peer_env, self.folder)

    def with_dtype(self) -> Bench:
        """What ours chooses here holds for both."""
        if self.setting.dtype != "auto":
            return self
        with self.ours("dtype") as worker:
            chosen = worker.ask("dtype", {}, seconds=0.0)["dtype"]
        self.say(f"products in {chosen}, the fastest here by probe")
        return replace(self, setting=replace(self.setting, dtype=chosen))


@dataclass
class Found:
    """Of one method, or of an adapter's files.

    Attributes:
        tokens: of a step.
        rounds: system → its answers, one per round.
        not_run: system → why.
    """

    name: str
    tokens: int = 0
    rounds: Answers = field(default_factory=dict)
    not_run: dict[str, str] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """Whether ours did."""
        return any(system.startswith(OURS) for system in self.not_run)

    def each(self, system: str, what: str) -> list[float]:
        """One figure of every round; nothing where the system did not run."""
        return [answer[what] for answer in self.rounds.get(system, [])]


def steps(bench: Bench, method: str) -> Found:
    """Steps of a method: ours, the peer's where it has it, and our LoRA's, which the others are held against."""
    known = pairs(bench.setting)
    pair, setting = known[method], asdict(bench.setting)
    found = Found(method, tokens=bench.setting.rows * bench.setting.tokens)
    with contextlib.ExitStack() as stack:
        asked: dict[str, Asked] = {OURS: _of_ours(bench, stack, method, pair, setting)}
        if bench.python is not None and pair.peft is not None:
            kind, arguments = pair.peft
            worker = stack.enter_context(bench.theirs(f"{method}-peft"))
            asked[PEER] = worker, "step", {"kind": kind, "arguments": arguments, "setting": setting}
        if method != "lora":
            lora = Pair(known["lora"].ours, needs_biases=pair.needs_biases)
            asked[LORA] = _of_ours(bench, stack, "lora", lora, setting, beside=method)
        _by_turns(bench, asked, found)
    return found


def files(bench: Bench, shape: Mapping[str, Any], rank: int) -> Found:
    """Saving and loading an adapter on all linear layers of a model of that shape, which itself takes no memory."""
    found, of = Found(FILES), {"shape": dict(shape), "rank": rank}
    with contextlib.ExitStack() as stack:
        sides = {OURS: stack.enter_context(bench.ours(FILES))}
        if bench.python is not None:
            sides[PEER] = stack.enter_context(bench.theirs(f"{FILES}-peft"))
        asked: dict[str, Asked] = {
            f"{system} {job}": (worker, job, of) for system, worker in sides.items() for job in ("save", "load")
        }
        _by_turns(bench, asked, found)
    return found


def _of_ours(
    bench: Bench, stack: contextlib.ExitStack, method: str, pair: Pair, setting: dict[str, Any], beside: str = ""
) -> Asked:
    worker = stack.enter_context(bench.ours(f"{beside or method}-{method}" if beside else method))
    return worker, "step", {
        "method": method, "settings": pair.ours, "setting": setting, "biased": pair.needs_biases
    }  # fmt: skip


def _by_turns(bench: Bench, asked: Mapping[str, Asked], found: Found) -> None:
    """Note what ``by_turns`` finds, and say it."""

    def told(turn: int, system: str, answer: dict[str, Any]) -> None:
        bench.say(
            f"round {turn}/{bench.rounds}  {found.name:<14}{system:<16}"
            f"{answer['cpu_seconds'] * 1e3:9,.1f} ms of the processor"
        )

    found.rounds = by_turns(asked, rounds=bench.rounds, seconds=bench.seconds, not_run=found.not_run, told=told)
    for system, why in found.not_run.items():
        bench.say(f"not run: {found.name}, {system}: {why}")
