"""The part ``load``: from a checkpoint to a model in NF4, each in a process that does nothing else."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from bench.environments import PEERS
from bench.measure import LONGEST
from bench.quant.findings import PEER, Bench, Figure, Findings, each, ratio
from bench.quant.rounds import by_rounds
from bench.runs import ROOT, FailedRunError, Runs

PACKED, PACKED_PEER = "truetune, packed", f"{PEER}, packed"
OURS = "truetune"


@dataclass(frozen=True)
class Loaded:
    """One load. Times in seconds, memory in MB (10^6 bytes).

    Attributes:
        load_s: the call alone; what it needs is imported before.
        process_s: from the start of the process to the model.
        forward_s: the first 16 tokens through it: pages of a mapped file are first touched here.
        anonymous_mb: most memory up to then that belongs to no file, looked at every few milliseconds.
        peak_mb: most resident memory up to the model, pages of mapped files included, as the system kept it.
    """

    load_s: float
    process_s: float
    forward_s: float
    anonymous_mb: float
    peak_mb: float


def load(bench: Bench) -> Findings:
    """A dense checkpoint quantised while it is read, and one that is packed already."""
    model = checkpoint(bench)
    packed, writing = _packed(bench, model)
    found = Findings()
    try:
        runs = by_rounds(bench, _systems(bench, model, packed), _line, found.not_run)
    finally:
        shutil.rmtree(packed)
    found.figures = figures(runs)
    found.details = {
        "truetune quantize": {"seconds": writing},
        **{system: [_rounded(one) for one in rounds] for system, rounds in runs.items()},
    }
    return found


def _systems(bench: Bench, model: Path, packed: Path) -> dict[str, Callable[[int], Loaded]]:
    ours = [sys.executable, "-m", "bench.quant.ours_load"]
    theirs = [str(bench.python), str(PEERS / "bitsandbytes_load.py")]
    own, peer = bench.env, bench.peer_env

    def loading(command: list[str], env: Mapping[str, str], name: str) -> Callable[[int], Loaded]:
        return lambda turn: measured(command, env, bench.runs / f"load-{turn}-{name}")

    found = {
        OURS: loading([*ours, str(model), "nf4"], own, "truetune"),
        PACKED: loading([*ours, str(packed), "none"], own, "truetune-packed"),
    }
    if bench.python is not None:
        found[PEER] = loading([*theirs, str(model), "nf4"], peer, PEER)
        found[PACKED_PEER] = loading([*theirs, str(packed), "none"], peer, f"{PEER}-packed")
    return found


def checkpoint(bench: Bench) -> Path:
    """The random model of this part's shape, made where it is not there yet."""
    setting = replace(bench.setting, shape=bench.load_shape)
    runs = Runs(
        setting=setting, work=bench.work, environments=bench.work, data=bench.data, recompute=None, env=bench.env
    )
    if not runs.model.is_dir():
        runs.prepare([], bench.say)
    return runs.model


def measured(command: Sequence[str], env: Mapping[str, str], folder: Path) -> Loaded:
    """Run ``command``, which leaves its marks in the file named by its last argument, and look at its memory.

    Raises:
        FailedRunError: it ended with an error, or not at all.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    marks = folder / "marks.json"
    began = time.time()
    with (folder / "output.txt").open("wb") as said:
        process = subprocess.Popen(
            [*command, str(marks)], cwd=ROOT, env=dict(env), stdin=subprocess.DEVNULL, stdout=said, stderr=said
        )
        try:
            samples = _samples(process, began)
        finally:
            process.kill()
            process.wait()
    if process.returncode or not marks.is_file():
        lines = (folder / "output.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise FailedRunError(f"ended with code {process.returncode}\n" + "\n".join(lines[-8:]))
    at = json.loads(marks.read_text(encoding="utf-8"))
    most = max((mb for when, mb in samples if when <= at["loaded"]), default=0.0)
    return Loaded(
        at["loaded"] - at["imported"], at["loaded"] - began, at["answered"] - at["loaded"], most, at["peak_mb"]
    )


def _samples(process: subprocess.Popen[bytes], began: float) -> list[tuple[float, float]]:
    """(clock, anonymous MB) until the process ends; empty where the system does not tell."""
    status, samples = Path(f"/proc/{process.pid}/status"), []
    while process.poll() is None:
        now = time.time()
        if now - began > LONGEST:
            raise FailedRunError(f"no end after {LONGEST:.0f} s")
        try:
            fields = dict(line.split(":", 1) for line in status.read_text(encoding="ascii").splitlines())
            samples.append((now, int(fields["RssAnon"].split()[0]) * 1024 / 1e6))
        except (OSError, KeyError, ValueError):
            pass  # it has just ended, or this is no Linux
        time.sleep(0.004)
    return samples


def _packed(bench: Bench, model: Path) -> tuple[Path, float]:
    """``truetune quantize``, anew in every session: folder, and the seconds it took."""
    out = bench.work / "models-quant" / f"{model.name}-nf4"
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    flags = ["--quant", "nf4", "--double-quant", "--json"]
    command = [sys.executable, "-m", "truetune", "quantize", str(model), str(out), *flags]
    done = subprocess.run(command, cwd=ROOT, env=dict(bench.env), capture_output=True, text=True, check=False)
    if done.returncode:
        raise FailedRunError(f"truetune quantize ended with code {done.returncode}\n{done.stderr[-2000:]}")
    return out, float(json.loads(done.stdout.splitlines()[-1])["seconds"])


def figures(runs: Mapping[str, list[Loaded]]) -> dict[str, Figure]:
    """Medians of ours, and what the peer takes over what we take.

    Args:
        runs: of each that ran, round by round.
    """
    found: dict[str, Figure] = {}
    for key, system in (("load", OURS), ("packed_load", PACKED)):
        one = _median(runs[system]) if system in runs else None
        for name in Loaded.__dataclass_fields__:
            found[f"{key}_{name.removeprefix('load_')}"] = None if one is None else round(getattr(one, name), 3)
    for key, ours, theirs in (("load", OURS, PEER), ("packed_load", PACKED, PACKED_PEER)):
        for name, of in (("speedup", "load_s"), ("memory_ratio", "anonymous_mb")):
            found[f"{key}_{name}_vs_{PEER}"] = ratio(*(each(of, runs.get(one, [])) for one in (theirs, ours)))
    return found


def _median(rounds: list[Loaded]) -> Loaded:
    return Loaded(*(statistics.median(getattr(one, name) for one in rounds) for name in Loaded.__dataclass_fields__))


def _rounded(one: Loaded) -> dict[str, float]:
    return {name: round(value, 3) for name, value in asdict(one).items()}


def _line(one: Loaded) -> str:
    return (
        f"load {one.load_s:6.2f} s  process {one.process_s:6.2f} s  first forward "
        f"{one.forward_s:5.2f} s  anonymous {one.anonymous_mb:6,.0f} MB  peak {one.peak_mb:6,.0f} MB"
    )
