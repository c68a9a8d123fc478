"""What each method makes of the embedded base in equally many steps: ``python -m bench.methods.quality``.

Every method is a run of ``truetune sft`` in a process of its own, on the demo's rows; what it ends with on the held-out
modules is the figure. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from bench.runs import ROOT, environment
from truetune.config.methods import METHODS
from truetune.recipes import demo_data

# Where a tiny model on few steps wants another than the method's usual rate, which is meant for large ones.
RATES = {
    "lora": 4e-3, "dora": 4e-3, "adalora": 6e-3, "bottleneck": 4e-3, "full": 5e-4, "lisa": 5e-4, "freeze": 5e-4,
}  # fmt: skip
_WITHOUT_BIASES = "bitfit"  # the base has none


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 measured, 3 a run failed."""
    options = parse(argv)
    folder = options.work / "quality"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    train, held_out = demo_data.rows(folder)
    found: dict[str, dict[str, Any]] = {}
    for method in options.methods:
        found[method] = one(method, train, held_out, folder, options)
        print(f"{method:<15}{shown(found[method])}", file=sys.stderr, flush=True)
    facts = {
        "bench": "methods.quality", "methods": found, "steps": options.steps, "batch_size": options.batch_size,
        "seed": options.seed, "threads": options.threads, "date": datetime.now().astimezone().isoformat("T", "seconds"),
    }  # fmt: skip
    print(table(found))
    print(json.dumps(facts))
    return 3 if any("failed" in result for result in found.values()) else 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags, checked."""
    known = [name for name in METHODS if name != _WITHOUT_BIASES]
    parser = argparse.ArgumentParser(prog="python -m bench.methods.quality", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--methods", default=",".join(known), help=f"of {','.join(known)}")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=ROOT / "out-bench", help="where the runs are")
    options = parser.parse_args(argv)
    options.methods = list(dict.fromkeys(name for name in options.methods.split(",") if name))
    if unknown := [name for name in options.methods if name not in known]:
        parser.error(f"--methods: {', '.join(unknown)}: known are {', '.join(known)}")
    if min(options.steps, options.batch_size, options.threads) < 1:
        parser.error("--steps, --batch-size and --threads: at least 1")
    options.work = options.work.resolve()
    return options


def one(method: str, train: Path, held_out: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """A run, and what it says of itself; ``failed`` with its last lines where it did not end."""
    out = folder / method
    rate = RATES.get(method, METHODS[method].lr)
    command = [
        sys.executable, "-m", "truetune", "sft", "--model", str(demo_data.base_folder()), "--data", str(train),
        "--val-data", str(held_out), "--out", str(out), "--method", method, "--lr", str(rate),
        "--max-steps", str(options.steps), "--batch-size", str(options.batch_size), "--seed", str(options.seed),
        "--max-length", "256", "--on-overlong", "drop", "--save-every", "0", "--dtype", "bfloat16", "--json",
    ]  # fmt: skip
    env = environment(options.work, options.threads)
    ended = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if ended.returncode:
        return {"failed": ended.stderr.strip().splitlines()[-6:]}
    said = json.loads(ended.stdout.splitlines()[-1])
    kept = {name: said[name] for name in ("val_loss_before", "val_loss", "tok_s", "peak_mb", "seconds")}
    size = sum(path.stat().st_size for path in Path(said["result"]).glob("*.safetensors"))
    return {**kept, "lr": rate, "bytes": size}


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """A line per method, the lowest loss first."""
    order = sorted(found, key=lambda name: found[name].get("val_loss", float("inf")))
    head = f"{'method':<15}{'before':>8}{'after':>8}{'lr':>8}{'KB':>8}{'tok/s':>8}{'peak MB':>9}"
    return "\n".join([head, *(f"{name:<15}{shown(found[name])}" for name in order)])


def shown(result: Mapping[str, Any]) -> str:
    """One method's figures in their columns."""
    if "failed" in result:
        return f"  failed: {result['failed'][-1] if result['failed'] else 'without a word'}"
    return (
        f"{result['val_loss_before']:>8.3f}{result['val_loss']:>8.3f}{result['lr']:>8.0e}{result['bytes'] / 1e3:>8,.0f}"
        f"{result['tok_s']:>8,.0f}{result['peak_mb']:>9,.0f}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
