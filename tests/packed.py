"""Models and layers whose weights are packed, and their dense twins."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from families import FAMILIES
from truetune.config.quant import QuantRecipe
from truetune.export.quantize import quantize_checkpoint
from truetune.models import load
from truetune.quant.base import QuantLinear

KINDS: dict[str, QuantRecipe] = {
    "nf4": QuantRecipe(kind="nf4"),
    "nf4-double": QuantRecipe(kind="nf4", double=True),
    "fp4": QuantRecipe(kind="fp4"),
    "int8": QuantRecipe(kind="int8"),
}


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal random numbers of their own seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def linear(inner: int, outer: int, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """An ``nn.Linear`` with normal weights."""
    layer = nn.Linear(inner, outer, bias=bias, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(values(outer, inner, seed=inner * 100 + outer))
        if bias:
            layer.bias.copy_(values(outer, seed=3))
    return layer


def packed_layers(model: nn.Module) -> dict[str, QuantLinear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, QuantLinear)}


def dense_twin(model: nn.Module) -> Any:
    """A copy with plain linear layers that hold what the packed ones stand for."""
    twin = copy.deepcopy(model)
    for path, layer in packed_layers(twin).items():
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, dtype=layer.dtype)
        plain.weight = nn.Parameter(layer.dense(), requires_grad=False)
        if layer.bias is not None:
            plain.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
        parent, _, name = path.rpartition(".")
        setattr(twin.get_submodule(parent), name, plain)
    return twin


def save_base(
    family: str, folder: Path, *, dtype: torch.dtype = torch.float32, shard: str = "1GB", **changes: Any
) -> Path:
    """A tiny model's checkpoint."""
    transformers.logging.disable_progress_bar()
    FAMILIES[family].make(**changes).to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def quantize(base: Path, out: Path, recipe: QuantRecipe, *, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """``base`` packed, in the new folder ``out``."""
    model = load.skeleton(load.load_config(str(base)), dtype=dtype)
    quantize_checkpoint(base, out, model, recipe, dtype=dtype, **options)
    return out
