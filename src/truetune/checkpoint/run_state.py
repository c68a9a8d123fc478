"""A training run's state: the trained tensors, the optimizer's, and a few counters. Nothing else is needed to go on.

``step-000100/`` holds ``adapter/`` (PEFT's format, usable as it is) or ``weights.safetensors`` for full tuning,
``optimizer.safetensors`` and ``state.json``. Data order and dropout are functions of the step: no generator is saved.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import Parameter

from truetune.adapters import files
from truetune.adapters.inject import attachment
from truetune.checkpoint.atomic import atomic_folder, faults, is_valid
from truetune.errors import CheckpointError

FOLDER = "checkpoints"


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        step: optimizer steps done.
        tokens: real tokens seen.
        trained_tokens: those that carried a loss.
        best_step, best_loss: the evaluation with the lowest held-out loss so far.
        first_loss: the held-out loss before training.
        facts: what must not change between start and resume (dtype, packing, micro_tokens, hashes).
    """

    step: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    best_step: int | None = None
    best_loss: float | None = None
    first_loss: float | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


def trained_state(model: nn.Module) -> dict[str, Parameter]:
    """Key on disk → parameter, for everything that is trained."""
    if attachment(model) is not None:
        return files.state(model)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def save(
    out: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, *, base: str | None, keep: int
) -> Path:
    """Write the checkpoint of ``progress.step`` under ``out``, then drop old ones beyond ``keep``.

    Raises:
        OutputError: the disk is full or read-only.
    """
    path = out / FOLDER / f"step-{progress.step:06d}"
    with atomic_folder(path) as folder:
        write_trained(model, folder, base=base)
        save_file(_optimizer_tensors(optimizer, trained_state(model)), folder / "optimizer.safetensors")
        (folder / "state.json").write_text(json.dumps(asdict(progress), indent=1), encoding="utf-8")
    _prune(out, keep, best=progress.best_step)
    return path


def write_trained(model: nn.Module, folder: Path, *, base: str | None, card: Mapping[str, Any] | None = None) -> None:
    """The trained tensors alone: an adapter folder, or one file of weights for full tuning."""
    if attachment(model) is not None:
        files.save(model, folder / "adapter", base=base, card=card)
    else:
        tensors = {name: p.detach().cpu().contiguous() for name, p in trained_state(model).items()}
        save_file(tensors, folder / "weights.safetensors", metadata={"format": "pt"})


def restore(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Progress:
    """Fill ``model`` (and ``optimizer``) from a checkpoint.

    Raises:
        CheckpointError: it is damaged, or does not belong to this model.
    """
    if problems := faults(path):
        raise CheckpointError(
            f"{path} is not a complete checkpoint",
            ("found", "\n".join(problems)),
            ("way out", "--resume auto takes the newest one that is"),
        )
    if attachment(model) is not None:
        files.fill(model, load_file(path / "adapter" / files.WEIGHTS), where=str(path))
    else:
        _fill_weights(model, load_file(path / "weights.safetensors"), path)
    if optimizer is not None:
        _fill_optimizer(optimizer, trained_state(model), load_file(path / "optimizer.safetensors"))
    return read_progress(path)


def read_progress(path: Path) -> Progress:
    """The counters of a checkpoint."""
    return Progress(**json.loads((path / "state.json").read_text(encoding="utf-8")))


def newest(out: Path) -> tuple[Path | None, list[Path]]:
    """``(newest valid checkpoint, damaged ones that are newer)``."""
    damaged: list[Path] = []
    for path in sorted((out / FOLDER).glob("step-*"), reverse=True):
        if is_valid(path):
            return path, damaged
        damaged.append(path)
    return None, damaged


def _prune(out: Path, keep: int, *, best: int | None) -> None:
    """Keep the newest ``keep`` and the best; temporary folders of killed saves go too."""
    found = sorted((out / FOLDER).glob("step-*"))
    spared = {f"step-{best:06d}"} if best is not None else set()
    for path in found[:-keep]:
        if path.name not in spared:
            shutil.rmtree(path, ignore_errors=True)
    for path in (out / FOLDER).glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def _fill_weights(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    expected = trained_state(model)
    if set(tensors) != set(expected):
        raise CheckpointError(f"{path} holds other tensors than this model trains")
    with torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(tensors[name])


def _optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: Mapping[str, Parameter]) -> dict[str, Tensor]:
    """``KEY.exp_avg`` and so on, for every parameter that has state."""
    tensors = {}
    for key, parameter in parameters.items():
        for name, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}.{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
    return tensors


def _fill_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, Parameter], tensors: Mapping[str, Tensor]
) -> None:
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        key, _, field_name = name.rpartition(".")
        by_parameter.setdefault(key, {})[field_name] = tensor
    for key, fields in by_parameter.items():
        parameter = parameters[key]
        optimizer.state[parameter] = {
            name: value if name == "step" else value.to(parameter.device) for name, value in fields.items()
        }
