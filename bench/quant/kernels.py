"""The parts ``quantize``, ``dequantize`` and ``optim``: single operations, systems asked by turns within a round."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from bench.environments import PEERS
from bench.quant.findings import PEER, Bench, Findings, least, ratio
from bench.runs import KEEP_FREED_MEMORY
from bench.workers import Answers, Worker, by_turns, seconds_of

NATIVE, REFERENCE, NAIVE = "native", "reference", "naive"
VARIABLE = "TRUETUNE_KERNELS"


def quantize(bench: Bench) -> Findings:
    """A bf16 weight to NF4, in values per second."""
    found = Findings()
    with _listening(bench) as workers:
        asked = {system: (worker, "quantize") for system, worker in workers.items()}
        for rows, columns in bench.weights:
            of = {"shape": [rows, columns], "dtype": "bfloat16", "double": False}
            _cell(bench, found, f"{rows}x{columns}", asked, of, values=rows * columns)
    return compared(found, "quantize", [("", NATIVE, PEER), ("reference_", REFERENCE, PEER)])


def dequantize(bench: Bench) -> Findings:
    """And back, to float32 and bf16, with plain and double quantised scales; into new memory each time."""
    found = Findings()
    with _listening(bench) as workers:
        asked = {system: (worker, "dequantize") for system, worker in workers.items()}
        asked[NAIVE] = workers[REFERENCE], "naive"
        for (rows, columns), dtype, double in (
            (shape, dtype, double)
            for shape in bench.weights
            for dtype in ("float32", "bfloat16")
            for double in (False, True)
        ):
            name = f"{rows}x{columns} {dtype}{' double' if double else ''}"
            of = {"shape": [rows, columns], "dtype": dtype, "double": double}
            _cell(bench, found, name, asked, of, values=rows * columns)
    pairs = [("", NATIVE, PEER), ("reference_", REFERENCE, PEER), ("reference_", REFERENCE, NAIVE)]
    return compared(found, "dequantize", pairs)


def optim(bench: Bench) -> Findings:
    """A step of AdamW with 8-bit moments, all parameters in one tensor and in 64."""
    found = Findings()
    with _listening(bench) as workers:
        asked = {system: (worker, "optim") for system, worker in workers.items()}
        for tensors in (1, 64):
            of = {"tensors": tensors, "values": bench.values}
            answers = _cell(bench, found, f"{tensors} tensors", asked, of, values=bench.values)
    compared(found, "optim", [("", NATIVE, PEER), ("reference_", REFERENCE, PEER)])
    for system, key in ((NATIVE, "optim_state_bytes_per_parameter"), (PEER, f"optim_state_bytes_per_parameter_{PEER}")):
        given = answers.get(system)
        found.figures[key] = round(given[0]["state_bytes"] / bench.values, 3) if given else None
    return found


@contextlib.contextmanager
def _listening(bench: Bench) -> Iterator[dict[str, Worker]]:
    """A worker per system; they wait without taking processor time."""
    ours = [sys.executable, "-m", "bench.quant.ours"]
    with contextlib.ExitStack() as stack:

        def start(name: str, command: list[str], env: Mapping[str, str]) -> Worker:
            return stack.enter_context(Worker(name, command, env, bench.runs))

        # Memory that is freed is kept, for each alike: or the first touch of new pages would be what is measured.
        kept = {"GLIBC_TUNABLES": KEEP_FREED_MEMORY}
        workers = {tier: start(tier, ours, {**bench.env, **kept, VARIABLE: tier}) for tier in (NATIVE, REFERENCE)}
        if bench.python is not None:
            script = str(PEERS / "bitsandbytes_kernels.py")
            workers[PEER] = start(PEER, [str(bench.python), script], {**bench.peer_env, **kept})
        yield workers


def _cell(
    bench: Bench, found: Findings, name: str, asked: dict[str, tuple[Worker, str]], of: dict[str, Any], *, values: int
) -> Answers:
    """Measure one cell, note it, say it."""
    jobs = {system: (worker, job, of) for system, (worker, job) in asked.items()}
    answers = by_turns(jobs, rounds=bench.turns, seconds=bench.seconds, not_run=found.not_run)
    cell: dict[str, Any] = {
        system: {
            "ms": round(1e3 * seconds, 3),
            "gval_s": float(f"{values / seconds / 1e9:.3g}"),
            "rounds_ms": [round(1e3 * one["seconds"], 3) for one in answers[system]],
        }
        for system, seconds in seconds_of(answers).items()
    }
    digests = {one["digest"] for rounds in answers.values() for one in rounds if "digest" in one}
    if digests and not of.get("double"):  # bitsandbytes rounds the scales' own codes otherwise
        cell["same_bits"] = len(digests) == 1
    found.details[name] = cell
    rates = ", ".join(f"{system} {cell[system]['ms']:,.2f} ms" for system in answers)
    bench.say(f"{name:<28} {rates}" + ("" if cell.get("same_bits", True) else "  (results differ)"))
    return answers


def compared(found: Findings, part: str, pairs: list[tuple[str, str, str]]) -> Findings:
    """The least speed-up over all cells; pairs are of (what the key says of ours, ours, theirs)."""
    cells = found.details.values()
    for which, ours, theirs in pairs:
        taken = [[cell.get(system, {}).get("rounds_ms", []) for system in (theirs, ours)] for cell in cells]
        found.figures[f"{part}_{which}speedup_vs_{theirs}"] = least(ratio(*pair) for pair in taken)
    same = [cell["same_bits"] for cell in cells if "same_bits" in cell]
    if same:
        found.figures[f"{part}_same_bits"] = all(same)
    return found
