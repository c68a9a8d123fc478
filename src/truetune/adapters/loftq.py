"""The weight of a quantised layer as it was before, for LoftQ: read from the files that the model was loaded from."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open
from torch import Tensor, nn

from truetune.errors import AdapterError

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def original_weight(model: nn.Module, path: str) -> Tensor:
    """[out, in], the dense weight of the layer at ``path``, in the dtype of the files.

    Raises:
        AdapterError: the model does not know its folder, or the files hold no dense weight of that layer.
    """
    config = getattr(model, "config", None)
    folder = Path(getattr(config, "name_or_path", "") or getattr(config, "_name_or_path", "") or "?")
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    names = [f"{path}.weight", f"{path}.weight".removeprefix(prefix), f"{prefix}{path}.weight"]
    files = _files(folder)
    name = next((name for name in names if name in files), None)
    if name is None:
        raise AdapterError(f"--init loftq: {folder} holds no weight of {path}", _WAY_OUT)
    with safe_open(files[name], framework="pt") as file:
        weight: Tensor = file.get_tensor(name)
    if not weight.is_floating_point():
        raise AdapterError(f"--init loftq: {folder} holds {path} packed, not as it was before", _WAY_OUT)
    return weight.T if getattr(model.get_submodule(path), "transposed", False) else weight


_WAY_OUT = ("way out", "--model with the folder of the unquantised base, and --quant")


def _files(folder: Path) -> dict[str, Path]:
    """Name of each tensor in a model's folder → its file."""
    if (folder / _INDEX).is_file():
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        return {name: folder / shard for name, shard in index["weight_map"].items()}
    if not (folder / _SINGLE).is_file():
        raise AdapterError(f"--init loftq: the base's own weights are needed, and {folder} has none", _WAY_OUT)
    with safe_open(folder / _SINGLE, framework="pt") as file:
        return dict.fromkeys(file.keys(), folder / _SINGLE)
