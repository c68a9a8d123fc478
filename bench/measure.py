"""One process, watched from outside: when its first step was done, how much memory it took at most.

Nothing here imports torch at the top. On Linux the peak of a new process begins with that of the process it was forked
from; the bench stays at a few MB, so that what it reports is the child's.

``python -m bench.measure SHAPE DTYPE`` measures the machine's ceiling: what ``F.linear`` reaches at its best.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.shapes import SHAPES, Shape

# Steps that are not timed: kernels are compiled, buffers taken and pages touched for the first time.
WARM_STEPS = 2
LONGEST = 3600.0
"""Seconds after which a process that has not ended is taken for stuck."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What every system trains: LoRA with alpha = 2 rank on all linear layers, AdamW."""

    shape: str
    dtype: str
    dropout: float
    rank: int
    batch_size: int
    max_length: int
    steps: int
    lr: float = 2e-4


@dataclass(frozen=True)
class Step:
    """One optimizer step, as a system's own log has it."""

    seconds: float  # of this step alone; the first one's is not used
    loss: float


@dataclass(frozen=True)
class Watched:
    """How a process went."""

    code: int
    seconds: float
    first_step_s: float | None  # from its start to the first line in its log
    peak_mb: float
    tail: str  # the last lines of what it said


@dataclass(frozen=True)
class Outcome:
    """One run of one system."""

    tok_s: float
    peak_mb: float
    first_step_s: float
    loss: float


def watch(command: Sequence[str], log: Path, *, env: Mapping[str, str], folder: Path) -> Watched:
    """Run ``command`` in ``folder`` until it ends; ``log`` is the file that gets a line per step.

    The peak is that of the process itself (its largest child, if one is larger), as the system kept it.
    """
    said = folder / "output.txt"
    with said.open("wb") as stream:
        began = time.perf_counter()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, cwd=folder, env=dict(env),
            start_new_session=True,
        )  # fmt: skip
        try:
            first, status, usage = _wait(process.pid, log, began)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    unit = 1 if sys.platform == "darwin" else 1024
    lines = said.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return Watched(process.returncode, seconds, first, usage.ru_maxrss * unit / 1e6, "\n".join(lines[-15:]))


def _wait(pid: int, log: Path, began: float) -> tuple[float | None, int, Any]:
    first = None
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        seconds = time.perf_counter() - began
        if first is None and log.is_file() and b"\n" in log.read_bytes():
            first = seconds
        if done:
            return first, status, usage
        if seconds > LONGEST:
            raise TimeoutError(f"no end after {LONGEST:.0f} s")
        time.sleep(0.01 if first is None else 0.2)


def steps_of_peer(log: Path, tokens: Sequence[int]) -> list[Step]:
    """Rows ``{"end": seconds of the clock, "loss": …}``, as the scripts in ``bench/peers`` write them.

    Args:
        tokens: of each step. A peer that counts its own may differ by 1 % (it may cut a word at the answer's start).
    Raises:
        ValueError: it counted others, so it trained on others.
    """
    rows = read_lines(log)
    if rows and abs(rows[-1].get("tokens_so_far", sum(tokens)) - sum(tokens)) > 0.01 * sum(tokens):
        raise ValueError(f"trained on {rows[-1]['tokens_so_far']} tokens, not on {sum(tokens)}")
    ends = [row["end"] for row in rows]
    return [Step(end - before, row["loss"]) for before, end, row in zip([ends[0], *ends], ends, rows, strict=False)]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def tokens_per_second(steps: Sequence[Step], tokens: Sequence[int]) -> float:
    """Real (unpadded) tokens over the time of the steps behind the warm ones."""
    if len(steps) != len(tokens):
        raise ValueError(f"{len(steps)} steps in the log, {len(tokens)} asked for")
    return sum(tokens[WARM_STEPS:]) / sum(step.seconds for step in steps[WARM_STEPS:])


def medians(runs: Sequence[Outcome]) -> Outcome:
    """Each figure's own median over the rounds."""
    return Outcome(*(statistics.median(getattr(run, name) for run in runs) for name in Outcome.__dataclass_fields__))


def ceiling(shape: Shape, dtype: str) -> dict[str, Any]:
    """The best rate of ``F.linear``, in GFLOP/s: 512 rows through the model's own weights, and 2048 cubed.

    The best of many runs, not the median: other processes only ever make a run slower.
    """
    import torch
    from torch.nn import functional as F

    best = 0.0
    for rows, width, out in sorted({(512, *linear) for linear in shape.linears()} | {(2048, 2048, 2048)}):
        x, weight = (torch.randn(n, width).to(getattr(torch, dtype)) for n in (rows, out))
        least, until = float("inf"), time.perf_counter() + 0.5
        while time.perf_counter() < until:
            start = time.perf_counter()
            F.linear(x, weight)
            least = min(least, time.perf_counter() - start)
        best = max(best, 2e-9 * rows * width * out / least)
    return {"gflops": round(best, 1), "threads": torch.get_num_threads(), "torch": torch.__version__}


if __name__ == "__main__":
    print(json.dumps(ceiling(SHAPES[sys.argv[1]], sys.argv[2])))
