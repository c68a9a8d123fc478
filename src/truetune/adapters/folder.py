"""What stands in an adapter's folder, read and written with an error that names the file."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from truetune.adapters.names import CONFIG
from truetune.errors import AdapterError, beside
from truetune.ops.finite import are_finite


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_pickle(path: Path) -> dict[str, Tensor]:
    """PEFT's older file; only tensors are unpickled."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise AdapterError(f"{path} can't be read: {reason}", ("likely", "a copy cut short, or no weights")) from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise AdapterError(f"{path} holds something else than tensors by name")
    return tensors


def no_adapter(folder: Path) -> AdapterError:
    """Why there is no adapter, and where the nearest one is."""
    if folder.is_file():
        return AdapterError(f"{folder} is a file", ("way out", "pass the folder that holds the adapter"))
    expected = ("expected", f"an adapter's folder, with {CONFIG}")
    if not folder.is_dir():
        return AdapterError(f"there is no folder {folder}", ("did you mean", beside(folder)), expected)
    found = sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
    way_out = f"pass {found[0]}" if found else "pass the folder that holds it"
    return AdapterError(f"{folder} is no adapter: it has no {CONFIG}", ("way out", way_out))


def check_values(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse an adapter that is no factors, or makes every answer NaN. Raises AdapterError, with the tensor's name."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise AdapterError(f"{folder} holds {kind} in {name}", ("expected", "floating-point numbers"))
        if not are_finite(tensor):
            raise AdapterError(
                f"{folder} holds NaN or infinity in {name}",
                ("likely", "a training that went wrong, or a file that was damaged"),
                ("way out", "an earlier checkpoint of its run: checkpoints/*/adapter"),
            )


def read_json(path: Path) -> dict[str, Any]:
    """An object. Raises AdapterError: it is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} can't be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise AdapterError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """As PEFT writes its config."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
