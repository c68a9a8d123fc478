"""Load a model with a quantised base: packed tensor by tensor while its files are read, or as it was packed before.

The dense parts are views of the files, and one dense weight at a time is in memory to be packed, so the peak is what
the model has in the end and its largest tensor.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from truetune.checkpoint import mapped
from truetune.checkpoint.header import TensorEntry
from truetune.checkpoint.tensors import load, name_in_checkpoint, open_index, weight_files
from truetune.config.quant import QuantRecipe
from truetune.errors import ModelError, QuantizationError
from truetune.models.stored import dense_config
from truetune.quant import bnb_state
from truetune.quant.base import QuantLinear
from truetune.quant.experts import MAPS, QuantExperts, stacks_of
from truetune.quant.replace import linear_layers, quantisable, quantisable_stacks, replace, replace_experts
from truetune.quant.stack import parts_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", bnb_state.STATE)


class _Lazy:
    """A tensor that is read when the loader takes it, by the slice that means all of it."""

    def __init__(self, entry: TensorEntry, read: Callable[[TensorEntry], Tensor]) -> None:
        self.entry, self._read = entry, read
        self.shape, self.dtype = torch.Size(entry.shape), entry.dtype

    def __getitem__(self, _: Any) -> Tensor:
        return self._read(self.entry)

    def get_shape(self) -> list[int]:
        return list(self.entry.shape)

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point


@mapped.own_pages()
def load_quantised(
    folder: Path, config: Any, recipe: QuantRecipe, *, dtype: torch.dtype, is_packed: bool
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, and what transformers says of the loading.

    Args:
        dtype: of the dense parts and of the products.
        is_packed: the files hold packed weights.
    Raises:
        ModelError: files that can't be read.
        QuantizationError: weights that can't be packed, or packed ones that don't fit.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, GenerationConfig

    entries = open_index(folder)
    cls = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    config = dense_config(config)
    prefix, lost = cls.base_model_prefix, set[str]()
    if is_packed:
        named = _checked_weights(folder, entries, recipe)
        shapes = dict[str, torch.Size]()
        state = {name: _lazy(e, named, shapes, dtype) for name, e in entries.items() if not _is_part(name, entries)}

        def prepare(model: PreTrainedModel) -> None:
            where = {path: name for path, _ in linear_layers(model) if (name := _stored(path, named, prefix))}
            replace(model, recipe, where, dtype=dtype)
            for path, name in where.items():
                layer = model.get_submodule(path)
                layer.awaits_packed = True
                shapes[name] = layer.weight.shape
            _prepare_stacks(model, recipe, named, shapes, prefix, dtype)
    else:
        to_pack = set[str]()
        state = {name: _Lazy(entry, _reader(to_pack, dtype)) for name, entry in entries.items()}

        def prepare(model: PreTrainedModel) -> None:
            paths = quantisable(model, recipe)
            names = {path: name_in_checkpoint(f"{path}.weight", entries, prefix) for path in paths}
            to_pack.update(name for name in names.values() if name)
            lost.update(path for path, name in names.items() if not name)
            stacks = [f"{path}.{own}" for path, found in quantisable_stacks(model, recipe).items() for own in found]
            to_pack.update(name for own in stacks if (name := name_in_checkpoint(own, entries, prefix)))
            # What the loader joins to other tensors is copied anyway: of a view its pages would stay.
            to_pack.update(set(entries) - {name_in_checkpoint(own, entries, prefix) for own in model.state_dict()})
            replace(model, recipe, dtype=dtype)

    with _absent_named(lost):
        model, info = _from_state(cls, config, state, prepare, dtype)
    if is_packed:
        _fill(model, entries, named, prefix)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(folder))
    model.config.name_or_path = str(folder)
    return model, info


def _from_state(
    cls: type[PreTrainedModel], config: Any, state: Mapping[str, Any], prepare: Callable[[Any], None], dtype: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Let transformers load, into a model whose linear layers were replaced as soon as it was built."""

    def build(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, config, *args, **kwargs)
        if type(self) is replaced:
            prepare(self)

    replaced: Any = type(cls.__name__, (cls,), {"__init__": build, "__module__": cls.__module__})
    with _one_by_one():
        model, info = replaced.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    model.__class__ = cls
    return model, info


def _prepare_stacks(
    model: Any, recipe: QuantRecipe, named: Mapping[str, str], shapes: dict[str, torch.Size], prefix: str, dtype: Any
) -> None:
    """Modules for the stacks of experts that the files hold packed."""
    for path, module in list(model.named_modules()):
        where = {own: name_in_checkpoint(f"{path}.{own}", named, prefix) for own in stacks_of(module)}
        if found := {own: name for own, name in where.items() if name}:
            experts = replace_experts(model, path, list(found), recipe, dtype=dtype)
            experts.awaits_packed = True
            shapes.update({name: getattr(experts, own).shape for own, name in found.items()})


@contextlib.contextmanager
def _one_by_one() -> Iterator[None]:
    """The loader reads ahead on threads of its own, as much as there is; this variable is its own way to stop that."""
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextlib.contextmanager
def _absent_named(lost: Collection[str]) -> Iterator[None]:
    """The loader fills what is in no file with whatever the memory holds, which need not be finite numbers.

    Args:
        lost: paths of layers whose weights are in the files under no name of theirs.
    """
    try:
        yield
    except QuantizationError as error:
        path = error.message.partition(":")[0]
        if path not in lost:
            raise
        raise ModelError(
            "--model: the weights do not fill the model that its config.json describes",
            ("missing", f"{path}.weight"),
            ("way out", "fetch the checkpoint again, or correct its config.json"),
        ) from None


def _reader(to_pack: set[str], dtype: torch.dtype) -> Callable[[TensorEntry], Tensor]:
    """What is packed is read, to be forgotten; what stays as it is, is a view of its file."""
    return lambda entry: load(entry) if entry.name in to_pack or entry.dtype != dtype else mapped.view(entry)


def check_dense_files(folder: Path) -> None:
    """That no weight in the files is packed, where the config says nothing of it; int8 codes would pass for weights.

    Raises:
        ModelError: naming what was found.
    """
    named = bnb_state.packed_weights(open_index(folder)) if weight_files(folder) else {}
    if named:
        name, kind = next(iter(named.items()))
        raise ModelError(
            f"--model: {folder} holds packed weights, and its config.json does not say so",
            ("found", f"{name}, {kind}" + (f", and {len(named) - 1} more" if named.keys() - {name} else "")),
            ("way out", "the config.json that was written with these weights: it has a quantization_config"),
        )


def _checked_weights(folder: Path, entries: Mapping[str, TensorEntry], recipe: QuantRecipe) -> dict[str, str]:
    """Name of each packed weight → its kind, which is what the config says."""
    named = bnb_state.packed_weights(entries)
    if not named:
        raise ModelError(
            f"--model: the config.json of {folder} says {recipe}, and its files hold no packed weight",
            ("way out", "fetch them again; or remove quantization_config from config.json, if the weights are dense"),
        )
    for name, kind in named.items():
        if kind != recipe.kind:
            raise QuantizationError(f"{name}: packed as {kind}, and config.json says {recipe.kind}")
    for name, entry in entries.items():
        codes = not entry.dtype.is_floating_point and not _is_part(name, entries)
        if codes and name.endswith((".weight", *MAPS)) and name not in named:
            parts = "SCB" if entry.dtype == torch.int8 else f"{name}.absmax and {name}{bnb_state.STATE}{recipe.kind}"
            raise QuantizationError(f"{name}: codes without what they mean", ("missing", parts))
    return named


def _is_part(name: str, entries: Mapping[str, TensorEntry]) -> bool:
    """Whether a tensor only belongs to a packed weight."""
    if name.endswith((".SCB", ".weight_format")):
        return True
    return any(part in name and name.partition(part)[0] in entries for part in _PARTS)


def _lazy(entry: TensorEntry, packed: Mapping[str, str], shapes: Mapping[str, torch.Size], dtype: torch.dtype) -> _Lazy:
    """A packed weight is filled in afterwards; the loader gets one number, in the shape that it expects."""
    if entry.name not in packed:
        return _Lazy(entry, _reader(set(), dtype))
    return _Lazy(entry, lambda e: torch.zeros((), dtype=dtype).expand(shapes.get(e.name, e.shape)))


def _stored(path: str, packed: Mapping[str, str], prefix: str) -> str | None:
    return name_in_checkpoint(f"{path}.weight", packed, prefix)


def _fill(model: PreTrainedModel, entries: Mapping[str, TensorEntry], packed: Mapping[str, str], prefix: str) -> None:
    left = set(packed)
    for path, module in model.named_modules():
        if isinstance(module, QuantLinear):
            name = _stored(path, packed, prefix)
            assert name is not None
            module.fill({p: mapped.view(entries[key]) for p, key in bnb_state.parts_of(name, entries).items()})
            module.awaits_packed = False
            left.discard(name)
        elif isinstance(module, QuantExperts):
            left -= _fill_stacks(path, module, entries, packed, prefix)
            module.awaits_packed = False
    if left:
        raise QuantizationError(
            f"{len(left)} packed weights belong to no linear layer of this model",
            ("tensors", ", ".join(sorted(left)[:6])),
        )


def _fill_stacks(
    path: str, module: QuantExperts, entries: Mapping[str, TensorEntry], packed: Mapping[str, str], prefix: str
) -> set[str]:
    """Names in the files of the stacks that were filled."""
    found = set[str]()
    for own in module.names:
        name = name_in_checkpoint(f"{path}.{own}", packed, prefix)
        assert name is not None
        module.fill(own, {p: mapped.view(entries[key]) for p, key in parts_of(name, entries, module.recipe).items()})
        found.add(name)
    return found
