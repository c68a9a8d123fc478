"""Start runs, read what they leave, and compare two of them to the bit."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from truetune.config.methods import METHODS
from truetune.config.resolve import resolve
from truetune.config.sft import PretrainConfig, SFTConfig
from truetune.recipes import pretrain, sft

TIMES = ("tok_s", "peak_mb")
# Held-out loss of the five steps: 5.43, 5.31, 5.79, 5.40, 5.44. At ten times this rate, rounding chose the least.
BEST_BEFORE_LAST: dict[str, Any] = {"val_split": 0.3, "eval_every": 1, "lr": 0.02, "schedule": "constant", "seed": 1}


def write_rows(path: Path, count: int = 14) -> Path:
    """Alpaca rows of different lengths; some words are the same in all, so that there is something to learn."""
    rows = [
        {"instruction": f"Count up to {n}", "output": " ".join(str(i) for i in range(n % 7 + 1)) + "."}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run_sft(model: Path, data: Path, out: Path, **flags: Any) -> dict[str, Any]:
    """One run in this process: 14 rows in steps of 4, two passes unless told otherwise."""
    settings = {"batch_size": 4, "epochs": 2, "rank": 4, "lr": 1e-2, "warmup": 2}
    if "rank" not in METHODS[flags.get("method", "lora")].config.model_fields:
        settings.pop("rank")
    named = {"model": str(model), "data": (str(data),), "out": str(out)}
    return sft.run(resolve(SFTConfig, file=None, flags={**settings, **named, **flags}))


def run_pretrain(model: Path, data: Path, out: Path, **flags: Any) -> dict[str, Any]:
    named = {"model": str(model), "data": (str(data),), "out": str(out)}
    return pretrain.run(resolve(PretrainConfig, file=None, flags={**named, **flags}))


def checkpoints(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def cut_after(whole: Path, step: int, out: Path) -> Path:
    """The run folder as a kill after ``step`` steps leaves it: nothing later but rows of the log."""
    shutil.copytree(whole, out)
    for path in (out / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    for name in ("adapter", "model"):
        shutil.rmtree(out / name, ignore_errors=True)
    (out / "report.md").unlink()
    return out


def log(out: Path) -> list[dict[str, Any]]:
    """The rows of log.jsonl without what a clock says."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def same_tensors(one: Path, other: Path) -> bool:
    """Whether two safetensors files hold the same bits under the same names."""
    ours, theirs = load_file(one), load_file(other)
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[k].flatten().view(torch.uint8), theirs[k].flatten().view(torch.uint8)) for k in ours
    )


def differences(one: Path, other: Path) -> list[str]:
    """What differs between two finished runs: their results, last checkpoints, logs and reports."""
    found = [] if log(one) == log(other) else ["log.jsonl"]
    report = "data/report.json"
    if json.loads((one / report).read_text()) != json.loads((other / report).read_text()):
        found.append(report)
    last = checkpoints(one)[-1]
    for pattern in ("adapter/*.safetensors", "model/*.safetensors", f"checkpoints/{last}/**/*.safetensors"):
        files = {p.relative_to(root) for root in (one, other) for p in root.glob(pattern)}
        found += [str(f) for f in files if not ((one / f).is_file() and (other / f).is_file())]
        found += [str(f) for f in files if (one / f).is_file() and (other / f).is_file()
                  and not same_tensors(one / f, other / f)]  # fmt: skip
    states = [json.loads((root / "checkpoints" / last / "state.json").read_text()) for root in (one, other)]
    return found if states[0] == states[1] else [*found, "state.json"]
