"""The part ``big``: Llama-2-7B's shape in NF4 trains on rows of about 512 tokens, with and without a limit on memory.

Rows are short for the model and long for the bench: a step takes most of a minute on two cores, so there are few.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from bench import ours
from bench.measure import LONGEST, Setting, read_lines, watch
from bench.quant.findings import Bench, Findings, each, ratio
from bench.quant.load import measured
from bench.runs import ROOT, FailedRunError, Runs

LAYERS = 32
# Steps, of which the first is not timed. B starts at zero, so A's gradient is zero in the first step.
STEPS = 3
# Of English, most of 512 tokens with the prompt around them; rows that come out longer are dropped.
CHARACTERS = 2_200
LIMITED = "big, limited"


@dataclass(frozen=True)
class Trained:
    """One run.

    Attributes:
        step_s: median over the timed steps.
        peak_mb: most resident memory of the process, pages of the mapped checkpoint included.
        first_step_s: from the start of the process.
        losses: of every step.
        adapter: a digest of the adapter's file.
    """

    step_s: float
    peak_mb: float
    first_step_s: float
    tokens: list[int]
    losses: list[float]
    adapter: str


def big(bench: Bench) -> Findings:
    """Load, train with everything resident, train within the limit; the checkpoint is removed in the end."""
    setting = replace(bench.setting, rank=8, dropout=0.0, batch_size=1, max_length=512, steps=STEPS)
    found, model = Findings(), bench.work / "models-quant" / "llama-2-7b-nf4"
    rows = long_rows(bench.data, bench.work / "long.jsonl")
    shutil.rmtree(model, ignore_errors=True)
    try:
        _make(bench, setting, model)
        opened = measured(
            [sys.executable, "-m", "bench.quant.ours_load", str(model), "none"], bench.env, bench.runs / "big-load"
        )
        resident = _train(bench, setting, model, rows, "big-resident", [])
        bench.say(f"resident     {_line(resident)}")
        try:
            limited = _train(bench, setting, model, rows, "big-limited", ["--max-memory", bench.limit])
            bench.say(f"within {bench.limit} {_line(limited)}")
        except FailedRunError as error:
            limited, found.not_run[LIMITED] = None, str(error)
            bench.say(f"not run: within {bench.limit}: {error}")
    finally:
        shutil.rmtree(model, ignore_errors=True)
    found.details = {
        "load": asdict(opened),
        "resident": asdict(resident),
        "limited": limited and asdict(limited),
        "limit": bench.limit,
    }
    found.figures = {
        "big_load_s": round(opened.load_s, 2),
        "big_step_s": round(resident.step_s, 2),
        "big_peak_mb": round(resident.peak_mb),
        "big_limited_peak_mb": None if limited is None else round(limited.peak_mb),
        "big_limited_time_ratio": ratio(each("step_s", [limited] if limited else []), [resident.step_s]),
        "big_limited_same_adapter": None if limited is None else limited.adapter == resident.adapter,
    }
    return found


def long_rows(data: Path, file: Path) -> Path:
    """Alpaca rows whose answers are those of ``data`` one after another, cut to about 512 tokens with their prompt."""
    text = data.read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines() if line] if data.suffix == ".jsonl" else json.loads(text)
    answers = "\n".join(row["output"] for row in rows)
    pieces = [answers[start : start + CHARACTERS] for start in range(0, len(answers) - CHARACTERS, CHARACTERS)]
    asked = [{"instruction": "Go on.", "input": "", "output": piece} for piece in pieces]
    file.write_text("".join(json.dumps(row) + "\n" for row in asked), encoding="utf-8")
    return file


def _make(bench: Bench, setting: Setting, folder: Path) -> None:
    """The packed checkpoint, with a small model's tokenizer."""
    small = Runs(
        setting=replace(setting, shape="smollm2-135m"), work=bench.work, environments=bench.work, data=bench.data,
        recompute=None, env=bench.env,
    )  # fmt: skip
    if not small.model.is_dir():
        small.prepare([], bench.say)
    bench.say(f"writing a packed checkpoint of Llama-2-7B's shape, 3.7 GB: {folder}")
    command = [sys.executable, "-m", "bench.quant.big_checkpoint", str(LAYERS), str(small.model), str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=dict(bench.env), capture_output=True, text=True, check=False)
    if done.returncode:
        raise FailedRunError(f"the checkpoint was not written\n{done.stderr[-2000:]}")


def _train(bench: Bench, setting: Setting, model: Path, rows: Path, name: str, flags: list[str]) -> Trained:
    folder = bench.runs / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    out = folder / "out"
    command = ours.command(setting, model=model, data=rows, out=out, steps=STEPS, recompute=None)
    try:
        watched = watch([*command, *flags], out / "log.jsonl", env=bench.env, folder=folder)
    except TimeoutError as error:
        raise FailedRunError(f"{name}: no end after {LONGEST:.0f} s") from error
    if watched.code or watched.first_step_s is None:
        raise FailedRunError(f"{name} ended with code {watched.code}\n{watched.tail}")
    steps = [row for row in read_lines(out / "log.jsonl") if "loss" in row]
    return Trained(
        step_s=statistics.median(row["tokens"] / row["tok_s"] for row in steps[1:]),
        peak_mb=watched.peak_mb,
        first_step_s=watched.first_step_s,
        tokens=[row["tokens"] for row in steps],
        losses=[row["loss"] for row in steps],
        adapter=hashlib.sha256((out / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest(),
    )


def _line(run: Trained) -> str:
    return (
        f"{run.step_s:6.1f} s a step of {'/'.join(map(str, run.tokens))} tokens  peak {run.peak_mb:6,.0f} MB  first "
        f"step {run.first_step_s:5.1f} s  losses {' '.join(f'{loss:.4f}' for loss in run.losses)}"
    )
