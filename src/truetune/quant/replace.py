"""Which layers of a model are quantised, and their replacement."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn

from truetune.config.quant import QuantRecipe
from truetune.errors import QuantizationError, counted, nearest
from truetune.ops.frozen import is_conv1d
from truetune.quant.experts import QuantExperts, stacks_of
from truetune.quant.form import quantised as quantised
from truetune.quant.packed import Packed
from truetune.quant.stack import Stack, stack_of

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
        _check_names(skip, [*layers, *(f"{path}.{name}" for path, name in _all_stacks(model))])
        leave.update(_ROUTERS)
    elif skip:  # who wrote this list put the head on it, or quantised that too
        head = None
    return [path for path, layer in layers.items() if layer is not head and not any(_has(path, name) for name in leave)]


def _check_names(skip: Iterable[str], layers: Iterable[str]) -> None:
    for name in skip:
        if not any(_has(path, name) for path in layers):
            leaves = Counter(path.rsplit(".", 1)[-1] for path in layers)
            raise QuantizationError(
                f"--quant-skip: the model has no layer to pack called '{name}'",
                ("did you mean", nearest(name, leaves)),
                ("it has", ", ".join(f"{leaf} x{count}" for leaf, count in leaves.items())),
            )


def linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """``(path, layer)`` of every plain linear map."""
    return ((path, module) for path, module in model.named_modules() if type(module) is nn.Linear or is_conv1d(module))


def _all_stacks(model: nn.Module) -> Iterator[tuple[str, str]]:
    """``(path of a module of experts, stack)`` of those that could be packed."""
    return ((path, name) for path, module in model.named_modules() for name in stacks_of(module))


def quantisable_stacks(model: nn.Module, recipe: QuantRecipe) -> dict[str, tuple[str, ...]]:
    """Path of each module of experts → those of its stacks of matrices to quantise; none where the recipe says so."""
    if not recipe.experts:
        return {}
    found = dict[str, tuple[str, ...]]()
    for path, name in _all_stacks(model):
        if not any(_has(f"{path}.{name}", skip) for skip in recipe.skip):
            found[path] = (*found.get(path, ()), name)
    return found


def planned_stacks(model: nn.Module, recipe: QuantRecipe, *, dtype: torch.dtype) -> dict[str, Stack]:
    """Path of each parameter that ``quantisable_stacks`` finds → the form that it gets."""
    return {
        (whole := f"{path}.{name}"): stack_of(model.get_submodule(path), name, recipe, dtype=dtype, path=whole)
        for path, names in quantisable_stacks(model, recipe).items()
        for name in names
    }


def dense_stacks(model: nn.Module) -> dict[str, int]:
    """Path of each parameter that stays a dense stack of matrices → its bytes.

    Experts are not among them where they were packed; some models keep theirs in a way that is not known here.
    """
    return {
        f"{path}.{name}".removeprefix("."): parameter.nbytes
        for path, module in model.named_modules()
        if not isinstance(module, (nn.Conv1d, nn.ConvTranspose1d))
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and parameter.is_floating_point() and name not in _codes_of(module)
    }


def _codes_of(module: nn.Module) -> Mapping[str, int]:
    return module.nbytes_by_parameter if isinstance(module, Packed) else {}


def stacks_remark(model: nn.Module) -> str | None:
    """A line about what stays dense beside packed layers and could be most of the model; None where there is none."""
    found = dense_stacks(model)
    if not found:
        return None
    megabytes = sum(found.values()) / 1e6
    size = f"{megabytes:,.{0 if megabytes >= 10 else 1}f} MB"
    names = ", ".join(dict.fromkeys(".".join(path.split(".")[-2:]) for path in found))
    return f"{size} of the model stay dense: {counted(len(found), 'stack')} of matrices ({names})"


def replace(model: nn.Module, recipe: QuantRecipe, paths: Iterable[str] | None = None, *, dtype: torch.dtype) -> int:
    """Put quantised layers in place of linear ones; weights that are there are quantised, meta ones as they come.

    Args:
        paths: which; default those of ``quantisable``, and the stacks of ``quantisable_stacks``.
        dtype: that the layers compute in.
    Returns:
        How many linear layers.
    """
    chosen = quantisable(model, recipe) if paths is None else list(paths)
    for path, names in quantisable_stacks(model, recipe).items() if paths is None else ():
        replace_experts(model, path, names, recipe, dtype=dtype)
    for path in chosen:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, quantised(model.get_submodule(path), recipe, path, dtype=dtype))
    return len(chosen)


def replace_experts(
    model: nn.Module, path: str, names: Sequence[str], recipe: QuantRecipe, *, dtype: torch.dtype
) -> QuantExperts:
    """Put a module of experts with packed stacks in place of a dense one."""
    parent, _, name = path.rpartition(".")
    packed = QuantExperts(model.get_submodule(path), names, recipe, dtype=dtype, path=path)
    setattr(model.get_submodule(parent), name, packed)
    return packed


def _head(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    try:
        return get() if get else None
    except NotImplementedError:  # a model without one
        return None


def _has(path: str, name: str) -> bool:
    """Whether ``name`` is a run of whole parts of a path: ``down_proj``, ``layers.0``, ``vision_tower``."""
    return f".{name}." in f".{path}."
