"""Whether a run may go on: the same settings, the same data, the same base; and from where."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from truetune.adapters.folder import read_json
from truetune.adapters.names import CARD
from truetune.checkpoint import run_state
from truetune.checkpoint.atomic import is_valid
from truetune.checkpoint.run_state import Progress
from truetune.config.resolve import Resolved
from truetune.config.sft import TrainConfig
from truetune.errors import AdapterError, CheckpointError
from truetune.ops import dispatch
from truetune.train.log import Screen

# Settings that may differ between a run and its resumption, because they do not change what is computed.
_FREE = {
    "out",
    "resume",
    "keep",
    "save_every",
    "eval_every",
    "log_every",
    "dry_run",
    "select",
    "device",
    "recompute",
    "max_memory",
    "verify",
    "verify_prompts",
}

_WORDS = {"tokens": "new tokens", "data": "data", "held_out": "held-out data", "base": "base model's weights",
          "start": "adapter that it goes on from", "on": "adapter that stays beneath"}  # fmt: skip

# A resumed run takes these from its checkpoint.
_OF_A_REPEAT = {"date": "day, which the template prints", "compute": "precision"}


def read_settings(path: Path) -> dict[str, Any]:
    """The settings a run was started with, from its ``run.yaml``.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        groups = yaml.safe_load((path / "run.yaml").read_text(encoding="utf-8"))
        return {key: value for group in groups.values() for key, value in group.items()}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError):
        raise CheckpointError(
            f"{path / 'run.yaml'} can't be read, so the run in this folder can't be told",
            ("way out", "choose another --out; its checkpoints can be named with --resume DIR"),
        ) from None


def check_settings(path: Path, config: TrainConfig) -> None:
    """Compare a config with ``run.yaml``: a resumed run with other settings would not be the run that was started."""
    before = read_settings(path)
    now = yaml.safe_load(yaml.safe_dump(json.loads(config.model_dump_json())))
    # A setting that is younger than the run was not there to be asked for: its default is what the run did.
    young = {key for key, info in type(config).model_fields.items() if getattr(config, key) == info.default} - {*before}
    changed = [
        f"--{key.replace('_', '-')}: {before.get(key)!r}, now {value!r}"
        for key, value in now.items()
        if key not in _FREE | young and before.get(key) != value
    ]
    if changed:
        raise CheckpointError(
            f"--resume: the run in {path} was started with other settings",
            ("changed", "\n".join(changed)),
            ("way out", f"give the same settings (--config {path / 'run.yaml'}), or another --out"),
        )


def facts_of(path: Path | None) -> dict[str, Any]:
    """What a checkpoint says must not change; nothing when there is none."""
    return dict(run_state.read_progress(path).facts) if path else {}


def check_facts(before: Mapping[str, Any], now: Mapping[str, Any], screen: Screen) -> None:
    """Compare the content of the files with what the run was started on, and the machine with the one it ran on.

    Raises:
        CheckpointError: naming what is another. The machine is no reason to refuse, but it is said.
    """
    changed = _changed(before, now, _WORDS)
    if changed:
        raise CheckpointError(
            f"--resume: the {' and the '.join(changed)} {'are' if len(changed) > 1 else 'is'} not what this run was "
            "started on",
            ("way out", "put the files back as they were, or start a new run with another --out"),
        )
    if differs := _elsewhere(before):
        screen.warn(f"--resume: {', '.join(differs)}: the run goes on the same up to rounding, not to the bit")


def tell_repeat(resolved: Resolved[Any], now: Mapping[str, Any], screen: Screen) -> None:
    """Where all settings are those of an earlier run's ``run.yaml``, say what else made its result, and is no more."""
    asked = {name for name, source in resolved.sources.items() if source == "flag"}
    if resolved.file is None or resolved.file.name != "run.yaml" or asked - _FREE:
        return
    run = resolved.file.parent
    for card in (run / result / CARD for result in ("adapter", "model")):
        with contextlib.suppress(AdapterError):
            before = read_json(card).get("facts") or {}
            other = [f"its {word}" for word in _changed(before, now, _WORDS | _OF_A_REPEAT)] + _elsewhere(before)
            if other:
                screen.note(f"no repeat of {run}: other than then are {', '.join(other)}")
            return


def _changed(before: Mapping[str, Any], now: Mapping[str, Any], words: Mapping[str, str]) -> list[str]:
    return [word for key, word in words.items() if key in before and before[key] != now.get(key)]


def _elsewhere(before: Mapping[str, Any]) -> list[str]:
    """In what the machine is another, as far as the last bits depend on it."""
    machine, was = environment(), before.get("environment", {})
    return [f"{key} {was[key]}, now {machine[key]}" for key in machine if was.get(key, machine[key]) != machine[key]]


def environment() -> dict[str, Any]:
    """What the last bits of a result depend on beside the settings."""
    return {"torch": str(torch.__version__), "threads": torch.get_num_threads(), "kernels": dispatch.describe()}


def restore(out: Path, checkpoint: Path, model: Any, optimizer: torch.optim.Optimizer, screen: Screen) -> Progress:
    """Fill model and optimizer from ``checkpoint``, and clear away what comes after it."""
    progress = run_state.restore(checkpoint, model, optimizer)
    if dropped := run_state.drop_newer(out, progress.step):
        screen.note(f"{', '.join(dropped)} will be made again")
    best = progress.best_step
    if best is not None and not is_valid(run_state.folder_of(out, best)):
        screen.warn(
            f"the best checkpoint so far, step {best}, is not in {out} any more: the best is sought from here on"
        )
        progress = replace(progress, best_step=None, best_loss=None)
    return progress
