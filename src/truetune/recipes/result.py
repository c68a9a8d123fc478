"""What a finished run leaves: the adapter or the model, its card, a report, a picture of the losses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import torch
import transformers

import truetune
from truetune.checkpoint.atomic import atomic_folder, sha256, write_text
from truetune.checkpoint.run_state import Progress, write_trained
from truetune.data.sources import find_files
from truetune.eval.perplexity import Evaluation
from truetune.models import load
from truetune.train.log import Screen
from truetune.train.memory import peak_mb

if TYPE_CHECKING:
    from truetune.recipes.training import Setup


def finish(
    setup: Setup, model: Any, progress: Progress, evaluation: Evaluation | None, *, screen: Screen, seconds: float
) -> dict[str, Any]:
    """Write everything a run ends with, and say where it is."""
    out = setup.folder.path
    card = make_card(setup, progress, evaluation)
    if setup.config.method == "lora":
        with atomic_folder(out / "adapter", manifest=False) as folder:
            write_trained(model, folder, base=_base_name(setup), card=card)
            _lift(folder / "adapter", folder)
        where = out / "adapter"
    else:
        where = _write_model(setup, model, out / "model", card)
    losses = _losses(setup.folder.log)
    plot(losses, out / "loss.png")
    write_text(out / "report.md", report(setup, card, losses, where))
    last = losses["train"][-1][1] if losses["train"] else math.nan
    held = (
        f" · held-out loss {progress.first_loss:.4f} → {evaluation.loss:.4f}"
        if evaluation and progress.first_loss
        else ""
    )
    screen.say("done", f"{progress.step} steps in {seconds:.0f} s · loss {last:.4f}{held}")
    if progress.best_step not in (None, progress.step) and setup.config.select == "last":
        screen.note(f"step {progress.best_step} had the lowest held-out loss; it is kept in {out}/checkpoints")
    screen.note(f"result: {where} · report: {out}/report.md")
    return {
        "out": str(out),
        "result": str(where),
        "steps": progress.step,
        "tokens": progress.tokens,
        "trained_tokens": progress.trained_tokens,
        "loss": last,
        "val_loss_before": progress.first_loss,
        "val_loss": evaluation.loss if evaluation else None,
        "val_accuracy": evaluation.accuracy if evaluation else None,
        "best_step": progress.best_step,
        "peak_mb": round(peak_mb(), 1),
        "seconds": round(seconds, 2),
    }


def make_card(setup: Setup, progress: Progress, evaluation: Evaluation | None) -> dict[str, Any]:
    """``truetune.json``: all that is needed to load the result the way it was trained."""
    config, template = setup.config, setup.prepared.template
    local = load.is_local(config.model)
    return {
        "format": 1,
        "base": {
            "name": _base_name(setup),
            "revision": config.revision,
            "weights_sha256": load.weight_hash(load.model_folder(config.model)) if local else None,
            "architecture": (setup.model_config.architectures or [None])[0],
        },
        "template": {"name": template.name, "source": template.source, "sha256": template.digest} if template else None,
        # Only stop tokens that were really trained; the tokenizer may know more.
        "stop_ids": sorted(set(setup.prepared.train.ends().tolist()) & setup.tokenizer.stop_ids),
        "quantisation": None,
        "data": {"files": {f: sha256(Path(f)) for f in find_files(config.data)}, **setup.prepared.report},
        "metrics": {
            "steps": progress.step,
            "tokens": progress.tokens,
            "trained_tokens": progress.trained_tokens,
            "held_out_loss_before": progress.first_loss,
            "held_out_loss": evaluation.loss if evaluation else None,
            "held_out_accuracy": evaluation.accuracy if evaluation else None,
        },
        "facts": dict(setup.facts),
        "versions": {
            "truetune": truetune.__version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            "safetensors": safetensors.__version__,
        },
    }


def report(setup: Setup, card: dict[str, Any], losses: dict[str, list[tuple[int, float]]], where: Path) -> str:
    """``report.md``: what was trained on what, before and after, and how to use it."""
    config, data, metrics = setup.config, setup.prepared.report, card["metrics"]
    rejected = ", ".join(f"{n} {reason}" for reason, n in data["rejected"].items()) or "none"
    lines = [
        f"# {where.parent.name}",
        "",
        f"- base: `{config.model}`"
        + (f", weights {card['base']['weights_sha256'][:12]}" if card["base"]["weights_sha256"] else ""),
        f"- method: {config.method}"
        + (f", r {config.rank}, alpha {config.alpha:g}" if config.method == "lora" else ""),
        f"- data: {', '.join(config.data)}; {data['read']:,} rows read, {data['used']:,} used, rejected: {rejected}",
        f"- tokens: {data['tokens']:,} in the data, {data['trained_tokens']:,} of them trained",
        f"- template: {card['template']['name'] if card['template'] else 'none (plain text)'}",
        f"- steps: {metrics['steps']:,}; {metrics['tokens']:,} tokens seen, padding not counted",
        "",
        "| | before | after |",
        "|---|---|---|",
        f"| training loss | {_at(losses['train'], 0)} | {_at(losses['train'], -1)} |",
        f"| held-out loss | {_number(metrics['held_out_loss_before'])} | {_number(metrics['held_out_loss'])} |",
        "",
        "How to use it:",
        "",
        "```",
    ]
    if config.method == "lora":
        lines += [
            f"truetune generate --model {config.model} --adapter {where} --prompt '…'",
            f"truetune merge --model {config.model} --adapter {where} --out merged",
        ]
    else:
        lines.append(f"truetune generate --model {where} --prompt '…'")
    return "\n".join([*lines, "```", ""])


def plot(losses: dict[str, list[tuple[int, float]]], path: Path) -> None:
    """Training and held-out curves as a picture, where matplotlib is installed (the ``plot`` extra)."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=120)
    for name, points in losses.items():
        if points:
            axes.plot(*zip(*points, strict=True), label=name, marker="o" if len(points) < 30 else None)
    axes.set(xlabel="step", ylabel="loss (nats per trained token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def _write_model(setup: Setup, model: Any, path: Path, card: dict[str, Any]) -> Path:
    """The fully tuned model, in its checkpoint's dtype, loadable by transformers."""
    with atomic_folder(path, manifest=False) as folder:
        load.save_model(model.to(load.checkpoint_dtype(setup.model_config)), folder)
        template = setup.prepared.template
        setup.tokenizer.save(folder, template.source if template else None)
        (folder / "truetune.json").write_text(json.dumps(card, indent=2, ensure_ascii=False), encoding="utf-8")
    return path


def _lift(inner: Path, outer: Path) -> None:
    for file in inner.iterdir():
        file.rename(outer / file.name)
    inner.rmdir()


def _base_name(setup: Setup) -> str:
    name = setup.config.model
    return str(Path(name).expanduser().resolve()) if load.is_local(name) else name


def _losses(log: Path) -> dict[str, list[tuple[int, float]]]:
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return {
        "train": [(row["step"], row["loss"]) for row in rows if "loss" in row],
        "held out": [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row],
    }


def _at(points: list[tuple[int, float]], index: int) -> str:
    return _number(points[index][1]) if points else "–"


def _number(value: float | None) -> str:
    return f"{value:.4f}" if value is not None else "–"
