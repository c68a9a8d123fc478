"""What a finished run leaves: the adapter or the model, its card, a report, a picture of the losses."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import truetune
from truetune.adapters.inject import settle
from truetune.checkpoint.atomic import atomic_folder, sha256, write_text
from truetune.checkpoint.run_state import Progress, read_progress, write_trained
from truetune.data.sources import find_files
from truetune.data.standard_input import path_of
from truetune.data.template import with_default_system
from truetune.errors import DataError, counted
from truetune.eval.perplexity import Evaluation
from truetune.models import load
from truetune.recipes import run_report, verify_reference
from truetune.recipes.adapter import base_name, describe_base
from truetune.recipes.merge_beside import GENERATION, with_stops
from truetune.recipes.plan_report import stored_as
from truetune.recipes.setup import Setup
from truetune.train.log import Screen
from truetune.train.memory import peak_mb


def finish(
    setup: Setup, model: Any, progress: Progress, evaluation: Evaluation | None, *, screen: Screen, seconds: float
) -> dict[str, Any]:
    """Write everything a run ends with, and say where it is."""
    out = setup.folder.path
    card = make_card(setup, progress, evaluation, files=_file_hashes(setup, screen))
    if not setup.config.trains_model:
        settle(model)
        with atomic_folder(out / "adapter", manifest=False) as folder:
            write_trained(model, folder, base=base_name(setup.config.model), card=card)
            _lift(folder / "adapter", folder)
            if setup.new:
                setup.tokenizer.save(folder, _template_with_system(setup))
        where = out / "adapter"
    else:
        where = _write_model(setup, model, out / "model", card)
    verify_reference.record(setup, model, autocast=functools.partial(setup.precision.context, setup.device))
    losses = run_report.read_losses(setup.folder.log)
    run_report.plot(losses, out / "loss.png")
    write_text(out / "report.md", run_report.report(setup, card, losses, where))
    result = _summary(setup, card, where, seconds=seconds)
    held = (
        f" · held-out loss {progress.first_loss:.4f} → {evaluation.loss:.4f}"
        if evaluation and progress.first_loss is not None
        else ""
    )
    loss = f" · loss {losses['train'][-1][1]:.4f}" if losses["train"] else ""
    screen.say("done", f"{counted(progress.step, 'step')} in {seconds:.0f} s{loss}{held}")
    if progress.best_step not in (None, progress.step) and setup.config.select == "last":
        screen.note(f"step {progress.best_step} had the lowest held-out loss; it is kept in {out}/checkpoints")
    screen.note(f"result: {where} · report: {out}/report.md")
    return result


def finished(setup: Setup, *, steps: int) -> dict[str, Any] | None:
    """What ``finish`` returned, when the run resumed has nothing left to do and its result is there; else None."""
    checkpoint, out = setup.folder.checkpoint, setup.folder.path
    where = out / ("model" if setup.config.trains_model else "adapter")
    if checkpoint is None or not (out / "report.md").is_file() or not (where / "truetune.json").is_file():
        return None
    progress = read_progress(checkpoint)
    card = json.loads((where / "truetune.json").read_text(encoding="utf-8"))
    metrics = card["metrics"]
    wanted = (steps, steps, _selected(setup, progress))
    if (progress.step, metrics["steps"], metrics.get("selected_step")) != wanted:
        return None
    return _summary(setup, card, where, seconds=0.0)


def _selected(setup: Setup, progress: Progress) -> int:
    """The step whose tensors become the result."""
    best = progress.best_step if setup.config.select == "best" else None
    return progress.step if best is None else best


def _summary(setup: Setup, card: dict[str, Any], where: Path, *, seconds: float) -> dict[str, Any]:
    metrics, out = card["metrics"], setup.folder.path
    losses = run_report.read_losses(setup.folder.log)["train"]
    return {
        "out": str(out),
        "result": str(where),
        "steps": metrics["steps"],
        "tokens": metrics["tokens"],
        "trained_tokens": metrics["trained_tokens"],
        "loss": losses[-1][1] if losses else None,
        "val_loss_before": metrics["held_out_loss_before"],
        "val_loss": metrics["held_out_loss"],
        "val_accuracy": metrics["held_out_accuracy"],
        "best_step": metrics["best_step"],
        "peak_mb": round(peak_mb(setup.device), 1),
        "tok_s": run_report.speed(setup.folder.log),
        "seconds": round(seconds, 2),
    }


def _file_hashes(setup: Setup, screen: Screen) -> dict[str, str | None]:
    """SHA-256 of each data file; None of one that is gone, which is said and is no reason to lose what was trained."""
    found: list[str] = []
    for path in setup.config.data:
        with contextlib.suppress(DataError):  # gone: its rows know which file they came from
            found += find_files([path])
    hashes: dict[str, str | None] = {}
    for name in dict.fromkeys([*found, *setup.prepared.train.files()]):
        try:
            hashes[name] = sha256(Path(path_of(name)))
        except OSError as error:
            hashes[name] = None
            screen.warn(f"{name}: no longer to be read ({error.strerror}); the result goes without its hash")
    return hashes


def make_card(
    setup: Setup, progress: Progress, evaluation: Evaluation | None, *, files: Mapping[str, str | None]
) -> dict[str, Any]:
    """``truetune.json``: all that is needed to load the result the way it was trained.

    Args:
        files: SHA-256 of each data file, None where it is not known.
    """
    config, template = setup.config, setup.prepared.template
    return {
        "format": 1,
        "base": {
            **describe_base(config.model, config.revision, setup.model_config),
            "vocabulary_sha256": setup.tokenizer.vocabulary_hash,
        },
        "template": {"name": template.name, "source": template.source, "sha256": template.digest} if template else None,
        "system": setup.prepared.system,
        "date": setup.prepared.date,
        # Only stop tokens that were really trained; the tokenizer may know more.
        "stop_ids": sorted(setup.prepared.train.ends() & setup.tokenizer.stop_ids),
        "quantisation": _quantisation(setup),
        "data": {"files": dict(files), **setup.prepared.report},
        "metrics": {
            "steps": progress.step,
            "selected_step": _selected(setup, progress),
            "best_step": progress.best_step,
            "tokens": progress.tokens,
            "trained_tokens": progress.trained_tokens,
            "held_out_loss_before": progress.first_loss,
            "held_out_loss": evaluation.loss if evaluation else None,
            "held_out_accuracy": evaluation.accuracy if evaluation else None,
        },
        "facts": dict(setup.facts),
        "versions": {
            "truetune": truetune.__version__,
            **{name: version(name) for name in ("torch", "transformers", "safetensors")},
        },
    }


def _quantisation(setup: Setup) -> dict[str, Any] | None:
    """How the base was stored while the adapter was trained on it."""
    recipe = stored_as(setup)
    return None if recipe is None else asdict(recipe)


def _write_model(setup: Setup, model: Any, path: Path, card: dict[str, Any]) -> Path:
    """The fully tuned model, in its checkpoint's dtype, loadable by transformers, and ending as it was taught to."""
    with atomic_folder(path, manifest=False) as folder:
        load.save_model(model.to(load.checkpoint_dtype(setup.model_config)), folder)
        setup.tokenizer.save(folder, _template_with_system(setup))
        if settings := with_stops(folder, card["stop_ids"]):
            (folder / GENERATION).write_bytes(settings)
        (folder / "truetune.json").write_text(json.dumps(card, indent=2, ensure_ascii=False), encoding="utf-8")
    return path


def _template_with_system(setup: Setup) -> str | None:
    """The template's source as the tokenizer's files take it; None for bare text."""
    prepared = setup.prepared
    return with_default_system(prepared.template.source, prepared.system) if prepared.template else None


def _lift(inner: Path, outer: Path) -> None:
    for file in inner.iterdir():
        file.rename(outer / file.name)
    inner.rmdir()
