"""Which layers of a model are quantised, and their replacement."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from truetune.config.quant import QuantRecipe
from truetune.errors import QuantizationError, counted, nearest
from truetune.ops.frozen import is_conv1d
from truetune.quant.base import QuantLinear
from truetune.quant.linear4bit import Linear4bit
from truetune.quant.linear8bit import Linear8bit

# Small, and their errors choose an expert or a class: the last parts of their names.
_ROUTERS = ("gate", "router", "shared_expert_gate", "classifier", "score")


def quantisable(model: nn.Module, recipe: QuantRecipe | None = None) -> list[str]:
    """Paths of the linear layers to quantise.

    These are all but the output head, routers, classifiers, what the model's own code wants in float32, and what the
    recipe skips.

    Raises:
        QuantizationError: the recipe skips a name that no linear layer has.
    """
    head, layers = _head(model), dict(linear_layers(model))
    skip, stored = (recipe.skip, recipe.of_checkpoint) if recipe else ((), False)
    leave = {*skip, *(getattr(model, "_keep_in_fp32_modules", None) or ())}
    if not stored:
        _check_names(skip, layers)
        leave.update(_ROUTERS)
    elif skip:  # who wrote this list put the head on it, or quantised that too
        head = None
    return [path for path, layer in layers.items() if layer is not head and not any(_has(path, name) for name in leave)]


def _check_names(skip: Iterable[str], layers: Iterable[str]) -> None:
    for name in skip:
        if not any(_has(path, name) for path in layers):
            leaves = Counter(path.rsplit(".", 1)[-1] for path in layers)
            raise QuantizationError(
                f"--quant-skip: the model has no linear layer called '{name}'",
                ("did you mean", nearest(name, leaves)),
                ("it has", ", ".join(f"{leaf} x{count}" for leaf, count in leaves.items())),
            )


def linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """``(path, layer)`` of every plain linear map."""
    return ((path, module) for path, module in model.named_modules() if type(module) is nn.Linear or is_conv1d(module))


def dense_stacks(model: nn.Module) -> dict[str, int]:
    """Path of each parameter that is a stack of matrices, as a mixture keeps its experts → its bytes.

    They are no linear layers, so they are not packed.
    """
    return {
        f"{path}.{name}".removeprefix("."): parameter.nbytes
        for path, module in model.named_modules()
        if not isinstance(module, (nn.Conv1d, nn.ConvTranspose1d))
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and parameter.is_floating_point()
    }


def stacks_remark(model: nn.Module) -> str | None:
    """A line about what stays dense beside packed layers and could be most of the model; None where there is none."""
    found = dense_stacks(model)
    if not found:
        return None
    megabytes = sum(found.values()) / 1e6
    size = f"{megabytes:,.{0 if megabytes >= 10 else 1}f} MB"
    names = ", ".join(dict.fromkeys(".".join(path.split(".")[-2:]) for path in found))
    return (
        f"{size} of the model stay dense: {counted(len(found), 'stack')} of matrices ({names}), which are no linear "
        "layers"
    )


def replace(model: nn.Module, recipe: QuantRecipe, paths: Iterable[str] | None = None, *, dtype: torch.dtype) -> int:
    """Put quantised layers in place of linear ones; weights that are there are quantised, meta ones as they come.

    Args:
        paths: which; default those of ``quantisable``.
        dtype: that the layers compute in.
    Returns:
        How many.
    """
    chosen = quantisable(model, recipe) if paths is None else list(paths)
    for path in chosen:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, quantised(model.get_submodule(path), recipe, path, dtype=dtype))
    return len(chosen)


def quantised(layer: nn.Module, recipe: QuantRecipe, path: str, *, dtype: torch.dtype) -> QuantLinear:
    """One layer in the form of a recipe."""
    if recipe.kind == "int8":
        return Linear8bit.from_base(layer, threshold=recipe.threshold, dtype=dtype, path=path)
    return Linear4bit.from_base(
        layer, kind=recipe.kind, blocksize=recipe.blocksize, double=recipe.double, dtype=dtype, path=path
    )


def _head(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    try:
        return get() if get else None
    except NotImplementedError:  # a model without one
        return None


def _has(path: str, name: str) -> bool:
    """Whether ``name`` is a run of whole parts of a path: ``down_proj``, ``layers.0``, ``vision_tower``."""
    return f".{name}." in f".{path}."
