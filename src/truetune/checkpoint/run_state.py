"""A training run's state: the trained tensors, the optimizer's, and a few counters. Nothing else is needed to go on.

``step-000100/`` holds ``adapter/`` (PEFT's format, usable as it is) or ``weights.safetensors`` for full tuning,
``optimizer.safetensors``, ``state.json``, and of a method that keeps more than its parameters while training (AdaLoRA),
``method.safetensors``. Data order and dropout are functions of the step: no generator is saved.
"""

from __future__ import annotations

import contextlib
import json
import re
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
from truetune.adapters.inject import adapters, attachment
from truetune.checkpoint.atomic import atomic_folder, faults, is_valid
from truetune.errors import CheckpointError

FOLDER = "checkpoints"
METHOD = "method.safetensors"


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
    path = folder_of(out, progress.step)
    with atomic_folder(path) as folder:
        write_trained(model, folder, base=base)
        save_file(_optimizer_tensors(optimizer, trained_state(model)), folder / "optimizer.safetensors")
        if state := _method_state(model):
            save_file({name: t.detach().cpu().contiguous() for name, t in state.items()}, folder / METHOD)
        (folder / "state.json").write_text(json.dumps(asdict(progress), indent=1), encoding="utf-8")
    _prune(out, keep, progress.step)
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
    check_whole(path)
    if attachment(model) is not None:
        files.fill(model, load_file(path / "adapter" / files.WEIGHTS), where=str(path))
    else:
        _fill_weights(model, load_file(path / "weights.safetensors"), path)
    _fill_method_state(model, path)
    if optimizer is not None:
        _fill_optimizer(optimizer, trained_state(model), load_file(path / "optimizer.safetensors"))
    return read_progress(path)


def check_whole(path: Path) -> None:
    """Raises CheckpointError unless every file of a checkpoint is as it was saved."""
    if problems := faults(path):
        raise CheckpointError(
            f"{path} is not a complete checkpoint",
            ("found", "\n".join(problems)),
            ("way out", "--resume auto takes the newest one that is"),
        )


def read_progress(path: Path) -> Progress:
    """The counters of a checkpoint.

    Raises:
        CheckpointError: they can't be read.
    """
    try:
        return Progress(**json.loads((path / "state.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path / 'state.json'} can't be read: {error}") from None


def folder_of(out: Path, step: int) -> Path:
    """Where the checkpoint after ``step`` steps lies."""
    return out / FOLDER / f"step-{step:06d}"


def newest(out: Path) -> tuple[Path | None, list[Path]]:
    """``(newest valid checkpoint, damaged ones that are newer)``."""
    damaged: list[Path] = []
    for _, path in reversed(_numbered(out)):
        if is_valid(path):
            return path, damaged
        damaged.append(path)
    return None, damaged


def drop_newer(out: Path, step: int) -> list[str]:
    """Remove the checkpoints after ``step``, damaged ones too: those steps will be done again. Returns their names."""
    newer = [path for number, path in _numbered(out) if number > step]
    for path in newer:
        shutil.rmtree(path, ignore_errors=True)
    return [path.name for path in newer]


def _numbered(out: Path) -> list[tuple[int, Path]]:
    """``(step, folder)`` of everything that is called like a checkpoint, oldest first."""
    named = ((re.fullmatch(r"step-(\d{6,})", path.name), path) for path in (out / FOLDER).glob("step-*"))
    return sorted((int(match[1]), path) for match, path in named if match and path.is_dir())


def _prune(out: Path, keep: int, step: int) -> None:
    """Keep the newest ``keep`` up to ``step``, and the best each of them names: should the newest be damaged, the run
    goes on from the one before, and still knows its best. Temporary folders of killed saves go too."""
    found = [path for number, path in _numbered(out) if number <= step]
    spared = {path.name for path in found[-keep:]}
    for path in found[-keep:]:
        # A damaged one names none; the run has its own reasons to say so.
        with contextlib.suppress(CheckpointError):
            best = read_progress(path).best_step
            spared |= {folder_of(out, best).name} if best is not None else set()
    for path in found:
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


def _method_state(model: nn.Module) -> dict[str, Tensor]:
    """What a method keeps while training beside its parameters, by layer and name."""
    found = {path: adapter.training_state() for path, adapter in adapters(model)}
    return {f"{path}.{name}": tensor for path, state in found.items() for name, tensor in state.items()}


def _fill_method_state(model: nn.Module, path: Path) -> None:
    expected = _method_state(model)
    tensors = load_file(path / METHOD) if (path / METHOD).is_file() else {}
    if {name: t.shape for name, t in tensors.items()} != {name: t.shape for name, t in expected.items()}:
        raise CheckpointError(f"{path / METHOD} does not hold what this method keeps while training")
    for name, tensor in expected.items():
        tensor.copy_(tensors[name])


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
    if unknown := sorted(set(by_parameter) - set(parameters)):
        raise CheckpointError(
            f"the optimizer's state is of tensors this model does not train: {', '.join(unknown[:5])}"
        )
    for key, fields in by_parameter.items():
        parameter = parameters[key]
        optimizer.state[parameter] = {
            # An int64 was a number of Python's; the fused AdamW's counter is a float, and stays beside the parameter.
            name: int(value) if value.dtype == torch.int64 else value.to(parameter.device)
            for name, value in fields.items()
        }
