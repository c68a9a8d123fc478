"""The tensors of an adapter file: which key is which parameter, filled exactly or not at all.

Keys are PEFT's. Loading compares every tensor that the model expects with every tensor in the file and reports all that
is missing, extra or misshaped at once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from truetune.adapters.base import Adapter, Change, LowRankUpdate
from truetune.adapters.beneath import Beneath, own_path, updates_by_layer
from truetune.adapters.inject import adapters, attachment
from truetune.adapters.lora_embedding import TiedHead
from truetune.adapters.methods import trained_parts
from truetune.adapters.names import ROOT as _ROOT
from truetune.adapters.token_rows import BASE_COPY, ROWS, HeadRows, TokenRows
from truetune.errors import AdapterError

_BASES = re.compile(r"(\.base)+(?=\.)")  # of a layer with one adapter, or with two


def state(model: nn.Module) -> dict[str, Parameter]:
    """Key in PEFT's file → parameter, for everything that is trained beside or in the frozen base."""
    made_of = {key_of(path, a, name): p for path, a in adapters(model) for name, p in a.makers()}
    return {**_stored(model), **made_of}


def _stored(model: nn.Module) -> dict[str, Parameter]:
    """Those of them that are in an adapter's file."""
    keys = {key_of(path, a, suffix): p for path, a in adapters(model) for suffix, p in a.adapter_parameters()}
    owned = {id(p) for p in keys.values()} | {id(p) for _, a in adapters(model) for _, p in a.makers()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in owned:
            keys[_ROOT + _BASES.sub(".base_layer", name)] = parameter
    return keys


def key_of(path: str, adapter: Adapter, suffix: str) -> str:
    """The key of an adapter's tensor."""
    return suffix if adapter.whole_keys else f"{_ROOT}{path}.{suffix}"


def to_file(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of ``adapter_model.safetensors``: what is trained, what layers share, and the tied head's copies."""
    tensors = {key: p.detach().cpu().contiguous() for key, p in {**_stored(model), **_shared(model)}.items()}
    return tensors | {copy.key: copy.of(tensors).clone().contiguous() for copy in _tied_copies(model)}


@dataclass(frozen=True)
class _TiedCopy:
    """What the head of a tied model repeats in the file of what the table holds."""

    key: str
    source: str
    transposed: bool

    def of(self, tensors: Mapping[str, Tensor]) -> Tensor:
        source = tensors[self.source]
        return source.T if self.transposed else source


def _tied_copies(model: nn.Module) -> list[_TiedCopy]:
    attached = attachment(model)
    if attached is None or not attached.tied:
        return []
    table, head = (f"{_ROOT}{path}" for path in attached.tied)
    if set(attached.tied) & set(attached.full_modules):
        return [_TiedCopy(f"{head}.weight", f"{table}.weight", transposed=False)]
    return [
        _TiedCopy(f"{head}.{suffix}", f"{table}.{source}", transposed=True)
        for suffix, source in TiedHead.copies.items()
    ]


def _repeated(model: nn.Module) -> list[_TiedCopy]:
    """What PEFT may say of a tied head a second time, and we do not: the table's rows."""
    attached = attachment(model)
    if attached is None or not attached.one_matrix:
        return []
    table, head = (f"{_ROOT}{path}.{ROWS}" for path in attached.one_matrix)
    return [_TiedCopy(head, table, transposed=False)]


def _shared(model: nn.Module) -> dict[str, Tensor]:
    """Key in the file → frozen tensor that the layers of a method have together."""
    return {key: tensor for _, adapter in adapters(model) for key, tensor in adapter.shared_tensors().items()}


def fill(model: nn.Module, tensors: Mapping[str, Tensor], *, where: str) -> None:
    """Copy ``tensors`` (keys as in PEFT's file) into the adapter that ``model`` carries; exactly all of them.

    Raises:
        AdapterError: they are not exactly those; then none was copied.
    """
    expected = {**_stored(model), **_shared(model)}
    copies = [*_tied_copies(model), *_repeated(model)]
    shapes = {key: p.shape for key, p in expected.items()}
    shapes |= {copy.key: copy.of(expected).shape for copy in copies}
    if problems := _misfits(model, expected, shapes, tensors):
        more = f"\n… and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise AdapterError(
            f"{where} does not fit this model: {len(problems)} of {len(tensors)} tensors",
            ("tensors", "\n".join(problems[:12]) + more),
            ("likely", "the adapter was trained on another base; its adapter_config.json names the one it knows"),
        )
    for copy in copies:
        if copy.key in tensors and not torch.equal(tensors[copy.key], copy.of(tensors)):
            raise AdapterError(
                f"{where}: {copy.key} differs from the embedding table's, and this model's head is the table",
                (
                    "way out",
                    "with ensure_weight_tying false in its adapter_config.json, the head is taken apart",
                ),
            )
    with torch.no_grad():
        for key, parameter in expected.items():
            parameter.copy_(tensors[key])


def _misfits(
    model: nn.Module, expected: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], tensors: Mapping[str, Tensor]
) -> list[str]:
    """One line per tensor that is missing, extra or misshaped."""
    missing = [f"missing    {key} {list(p.shape)}" for key, p in expected.items() if key not in tensors]
    extra = [
        f"extra      {key} {list(tensor.shape)}"
        for key, tensor in sorted(tensors.items())
        if key not in shapes and not _is_base_copy(model, key, tensor)
    ]
    misshaped = [
        f"misshaped  {key}: found {list(tensors[key].shape)}, expected {list(shape)}"
        for key, shape in shapes.items()
        if key in tensors and tensors[key].shape != shape
    ]
    return missing + extra + misshaped


def changes(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Change]:
    """Name of a base parameter → what merging makes of it, for every wrapped layer.

    Raises:
        AdapterError: the method does not fold into weights.
    """
    result: dict[str, Change] = {}
    for path, adapter in adapters(model):  # of two on one layer the outer one first
        found, layer = adapter.changes(_own(path, adapter, tensors)), own_path(path)
        if isinstance(adapter, Beneath):
            outer = {name: result.pop(f"{layer}.{name}") for name in ("weight", "bias") if f"{layer}.{name}" in result}
            found = {**found, **{name: adapter.then(name, change) for name, change in outer.items()}}
        result |= {f"{layer}.{name}": change for name, change in found.items()}
    return result


def _own(path: str, adapter: Adapter, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's tensors in a file, by their suffixes."""
    return {suffix: tensors[key_of(path, adapter, suffix)] for suffix, _ in adapter.adapter_parameters()}


def file_updates(layers: Mapping[str, Adapter], tensors: Mapping[str, Tensor]) -> dict[str, LowRankUpdate]:
    """Path → the low-rank update that the tensors of a file are, of layers that may be without storage."""
    return updates_by_layer(layers, {path: _own(path, layer, tensors) for path, layer in layers.items()})


def frozen_updates(model: nn.Module, tensors: Mapping[str, Tensor], *, where: str) -> dict[str, LowRankUpdate]:
    """Path → update of the adapter that a model carries, for another adapter to be put on top.

    Raises:
        AdapterError: it does more than low-rank updates of linear layers.
    """
    attached = attachment(model)
    assert attached is not None
    layers, kind = dict(adapters(model)), attached.config.kind
    updates = file_updates(layers, tensors)
    because = None
    if attached.full_modules or trained_parts(attached.config) or attached.rows:
        because = "it has parts of the base, or rows of tokens, that were trained in full"
    elif {own_path(path) for path in layers} - updates.keys() or any(u.kind != "linear" for u in updates.values()):
        because = f"what {kind} makes of some layers is no low-rank update of a linear map"
    if because:
        raise AdapterError(
            f"{where} ({kind}) is no adapter that another can be trained on top of",
            ("because", because),
            ("expected", "lora, adalora or vera on linear layers, and nothing else trained"),
            ("way out", "truetune merge folds it into the base, and the result is a base like any other"),
        )
    return updates


def replaced_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name of a base parameter → the tensor the file holds in its place, for parts that were trained in full."""
    own = {key_of(path, a, suffix) for path, a in adapters(model) for suffix, _ in a.adapter_parameters()}
    replaced = [key for key in _stored(model) if key not in own]
    return {key.removeprefix(_ROOT).replace(".base_layer.", "."): tensors[key] for key in replaced}


def base_copies(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name of a base parameter → the copy of it that PEFT stored beside an adapter on an embedding or a head."""
    mark = ".base_layer.weight"
    held = {key.removeprefix(_ROOT): tensor for key, tensor in tensors.items()}
    copies = {path: held[path + mark] for path, _ in adapters(model) if path + mark in held}
    return {f"{path}.weight": tensor for path, tensor in copies.items()}


def _is_base_copy(model: nn.Module, key: str, tensor: Tensor) -> bool:
    """PEFT stores the whole frozen table beside an adapter on it; fine as long as it is this model's own."""
    stem = key.removeprefix(_ROOT)
    path, found, rest = stem.partition(f".{BASE_COPY}" if stem.endswith(BASE_COPY) else ".base_layer.weight")
    wrapped = dict(adapters(model)).get(path)
    if not found or rest or wrapped is None:
        return False
    weight, attached = wrapped.weight, attachment(model)
    before = attached.grew_from if attached and attached.grew_from is not None else len(weight)
    trained = set(wrapped.ids.tolist()) if isinstance(wrapped, HeadRows | TokenRows) else set()
    if tensor.shape != weight.shape or not set(range(before, len(weight))) <= trained:
        return False
    return weight.is_meta or torch.equal(tensor[:before].to(weight), weight[:before])
