"""A recipe's words as layers: which class packs a linear map so, and with which settings."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from truetune.config.quant import QuantRecipe
from truetune.quant.base import QuantLinear
from truetune.quant.linear4bit import Linear4bit
from truetune.quant.linear8bit import Linear8bit


def form_of(recipe: QuantRecipe) -> tuple[type[QuantLinear], dict[str, Any]]:
    """``(class, its own settings)``."""
    if recipe.kind == "int8":
        return Linear8bit, {"threshold": recipe.threshold}
    return Linear4bit, {"kind": recipe.kind, "blocksize": recipe.blocksize, "double": recipe.double}


def quantised(layer: nn.Module, recipe: QuantRecipe, path: str, *, dtype: torch.dtype) -> QuantLinear:
    """One layer in the form of a recipe."""
    cls, settings = form_of(recipe)
    return cls.from_base(layer, **settings, dtype=dtype, path=path)
