"""Rows to tokens, masks and packed blocks, ours beside ``datasets``: ``python -m bench.data --peers datasets``.

Each run is a process of its own with an empty cache; the systems take turns, and medians are compared. See
``bench/README.md`` for what is the same for all and what is not. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from bench import environments
from bench.report import say
from bench.runs import ALPACA, NOT_FOR_PEERS, OFFLINE, ROOT, FailedRunError

PEER = "datasets"
TOKENIZERS = ROOT.parent / "shared" / "models" / "tokenizers"
_HEAD = ("Below is an instruction that describes a task{pair}. Write a response that appropriately completes the "
         "request.\n\n### Instruction:\n{{instruction}}{field}\n\n### Response:\n")  # fmt: skip
PROMPTS = {
    "with_input": _HEAD.format(
        pair=", paired with an input that provides further context", field="\n\n### Input:\n{input}"
    ),
    "without_input": _HEAD.format(pair="", field=""),
}
# What a recipe may choose: rows one by one (the usual form) or in batches, in one process or on all cores.
WAYS = {
    "datasets": {"batched": False, "processes": 1},
    "datasets_batched": {"batched": True, "processes": 1},
    "datasets_all_cores": {"batched": False, "processes": len(os.sched_getaffinity(0))},
}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 measured, 2 a flag is wrong or the peer is not installed, 3 a run failed."""
    options = parse(argv)
    python = environments.interpreter(options.environments, PEER) if options.peers else None
    if options.peers and python is None and options.install:
        environments.install(options.environments, PEER)
        python = environments.interpreter(options.environments, PEER)
    if options.peers and python is None:
        say(f"error: no environment for {PEER} in {options.environments}\n"
            "  way out   the same command with --install makes it there")  # fmt: skip
        return 2
    try:
        facts = measure(options, python)
    except FailedRunError as error:
        say(f"error: {error}")
        return 3
    if not options.json:
        print(table(facts))
    print(json.dumps(facts))
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags, checked."""
    parser = argparse.ArgumentParser(prog="python -m bench.data", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peers", choices=(PEER, "none"), default="none")
    parser.add_argument("--ways", default="datasets", help=f"of the peer, of {','.join(WAYS)}")
    parser.add_argument("--rows", type=int, default=52_000)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--big-gb", type=float, default=0.2, help="size of the file for the peak; 0 leaves it out")
    parser.add_argument("--tokenizer", type=Path, default=TOKENIZERS / "gpt2", help="folder with a tokenizer.json")
    parser.add_argument("--data", type=Path, default=ALPACA, help="alpaca rows, a JSON array")
    parser.add_argument("--work", type=Path, default=ROOT / "out-bench" / "data")
    parser.add_argument("--environments", type=Path, default=ROOT / "out-bench" / "environments")
    parser.add_argument("--install", action="store_true", help="make the peer's environment")
    parser.add_argument("--json", action="store_true", help="the last line alone, without the table")
    options = parser.parse_args(argv)
    options.peers = [] if options.peers == "none" else [way for way in options.ways.split(",") if way]
    if unknown := [way for way in options.peers if way not in WAYS]:
        parser.error(f"--ways: {', '.join(unknown)}: known are {', '.join(WAYS)}")
    if options.rows < 1 or options.rounds < 1 or options.big_gb < 0:
        parser.error("--rows and --rounds: at least 1, --big-gb: not negative")
    for path in (options.data, options.tokenizer / "tokenizer.json"):
        if not path.is_file():
            parser.error(f"no file {path}")
    options.work, options.environments = options.work.resolve(), options.environments.absolute()
    return options


def measure(options: argparse.Namespace, python: Path | None) -> dict[str, Any]:
    """All runs, by turns.

    Raises:
        FailedRunError: a process failed.
    """
    work: Path = options.work
    shutil.rmtree(work, ignore_errors=True)
    model, data = _model(work, options.tokenizer), work / "rows.jsonl"
    write_rows(options.data, data, count=options.rows)
    found: dict[str, list[dict[str, Any]]] = {}
    second: list[dict[str, Any]] = []
    for turn in range(options.rounds):
        task = {"model": str(model), "data": str(data), "length": options.length}
        cache = work / f"cache-{turn}"
        for runs in (found.setdefault("truetune", []), second):
            runs.append(_process([sys.executable, "-m", "bench.data.ours", json.dumps(task | {"pack": True})], cache))
        say(
            f"round {turn + 1}: truetune {found['truetune'][-1]['seconds']:.1f} s, "
            f"again {second[-1]['prepare_s']:.2f} s"
        )
        for way in options.peers:
            assert python is not None
            file = work / "task.json"
            peers_cache = str(work / f"{way}-{turn}")
            file.write_text(json.dumps(task | PROMPTS | WAYS[way] | {"cache": peers_cache}), encoding="utf-8")
            command = [str(python), str(environments.PEERS / "datasets_tokenise.py"), str(file)]
            found.setdefault(way, []).append(_process(command, cache))
            say(f"round {turn + 1}: {way} {found[way][-1]['seconds']:.1f} s")
    facts = facts_of(found, second, options)
    if options.big_gb:
        facts |= _big(options, model)
    return facts


def facts_of(
    found: dict[str, list[dict[str, Any]]], second: list[dict[str, Any]], options: argparse.Namespace
) -> dict[str, Any]:
    """What the JSON line holds, from the answers of all processes."""
    seconds = {name: statistics.median(run["seconds"] for run in runs) for name, runs in found.items()}
    ours = found["truetune"][0]
    return {
        "bench": "data",
        "date": datetime.now().date().isoformat(),
        "rows": ours["rows"],
        "tokens": ours["tokens"],
        "tokenizer": options.tokenizer.name,
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "rows_s": {name: round(options.rows / value, 1) for name, value in seconds.items()},
        "seconds": {name: [round(run["seconds"], 2) for run in runs] for name, runs in found.items()},
        "cpu_s": {name: round(statistics.median(run["cpu_s"] for run in runs), 1) for name, runs in found.items()},
        **{f"speedup_vs_{name}": round(value / seconds["truetune"], 2) for name, value in seconds.items()
           if name != "truetune"},
        "second_start_s": round(statistics.median(run["prepare_s"] for run in second), 3),
        "second_from_cache": all(run["cached"] for run in second),  # not where the code changed in between
        "fill": round(ours["fill"], 4),
    }  # fmt: skip


def _big(options: argparse.Namespace, model: Path) -> dict[str, Any]:
    data = options.work / "big.jsonl"
    write_rows(options.data, data, size=int(options.big_gb * 1e9))
    task = {"model": str(model), "data": str(data), "length": options.length, "pack": False}
    made = _process([sys.executable, "-m", "bench.data.ours", json.dumps(task)], options.work / "cache-big")
    data.unlink()
    shutil.rmtree(options.work / "cache-big", ignore_errors=True)
    names = {"peak_mb": "big_peak_mb", "worker_peak_mb": "big_worker_peak_mb", "prepare_s": "big_prepare_s"}
    return {
        "big_gb": options.big_gb,
        "big_rows": made["rows"],
        **{new: round(made[old], 1) for old, new in names.items()},
    }


def write_rows(source: Path, path: Path, *, count: int | None = None, size: int | None = None) -> None:
    """The rows of ``source`` again and again, told apart by a counter, until there are ``count`` or ``size`` bytes."""
    rows = json.loads(source.read_text(encoding="utf-8"))
    path.parent.mkdir(parents=True, exist_ok=True)
    number = written = 0
    with path.open("w", encoding="utf-8") as file:
        while number < count if count is not None else written < (size or 0):
            row = rows[number % len(rows)]
            row = {**row, "instruction": f"{row['instruction']} ({number})"}
            written += file.write(json.dumps(row, ensure_ascii=False) + "\n")
            number += 1


def table(facts: dict[str, Any]) -> str:
    """A line per system."""
    lines = [f"{name:<20} {value:>10,.0f} rows/s" for name, value in facts["rows_s"].items()]
    return "\n".join([*lines, f"{'second start':<20} {facts['second_start_s']:>10.2f} s",
                      f"{'fill':<20} {facts['fill']:>10.1%}"])  # fmt: skip


def _model(work: Path, tokenizer: Path) -> Path:
    """The tokenizer beside a config: what a tokenizer is read from."""
    folder = work / "model"
    shutil.copytree(tokenizer, folder)
    folder.chmod(0o755)
    (folder / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    return folder


def _process(command: Sequence[str], cache: Path) -> dict[str, Any]:
    """Run a process and read the last line that it printed."""
    env = {name: value for name, value in os.environ.items() if name not in NOT_FOR_PEERS} | OFFLINE
    if command[0] == sys.executable:
        env |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")]), "TRUETUNE_CACHE": str(cache)}
    before = _cpu_seconds()
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        raise FailedRunError(f"{' '.join(command[:3])} failed:\n{done.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer | {"cpu_s": _cpu_seconds() - before}


def _cpu_seconds() -> float:
    """Of all processes that were waited for so far, imports and all."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    sys.exit(main())
