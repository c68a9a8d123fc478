"""One adapter that is off its model: what stands in the base's places while it is in use."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn
from torch.nn import Parameter

from truetune.adapters import files
from truetune.adapters.base import Adapter, LowRankUpdate
from truetune.adapters.beneath import updates_by_layer
from truetune.adapters.composed import flattened
from truetune.adapters.files import AdapterFile
from truetune.adapters.inject import Attachment, adapters, attachment, detach
from truetune.adapters.vocabulary import rows_of_table
from truetune.errors import AdapterError

_Parameters = list[tuple[nn.Module, str, Parameter]]  # owner, name, and what was there


@dataclass(frozen=True)
class Place:
    """Where a layer stands: an attribute of a module, and what is there without and with the adapter."""

    owner: nn.Module
    name: str
    base: nn.Module
    own: nn.Module


@dataclass(frozen=True)
class Part:
    """The same of a parameter that the adapter trained in full."""

    owner: nn.Module
    name: str
    base: Parameter
    own: Parameter


@dataclass(frozen=True)
class Held:
    """An adapter of a model.

    Attributes:
        attachment: how it was attached.
        layers: path → adapted layer.
        places: path → where that layer goes.
        parts: parts of the base that it trained in full.
    """

    attachment: Attachment
    layers: Mapping[str, Adapter]
    places: Mapping[str, Place]
    parts: tuple[Part, ...]

    @cached_property
    def updates(self) -> Mapping[str, LowRankUpdate]:
        """Path → A, B and scale, of the layers that have such; references where the layer holds them as they are."""
        return updates_by_layer(self.layers)

    @property
    def singly(self) -> Mapping[str, Adapter] | None:
        """Path → the one adapter of a layer; one on top of another as both in a LoRA, None where they are none."""
        return flattened(self.layers) if self.attachment.beneath else self.layers

    @property
    def count(self) -> int:
        """Its own parameters."""
        own = {id(p): p for layer in self.layers.values() for _, p in layer.adapter_parameters()}
        return sum(p.numel() for p in (own | {id(part.own): part.own for part in self.parts}).values())

    def plug(self, model: nn.Module) -> None:
        """Put it in the base's places; it trains or not as these do, and is where they are."""
        self.follow()
        for place in self.places.values():
            if place.own.training != place.base.training:
                place.own.train(place.base.training)
            setattr(place.owner, place.name, place.own)
        for part in self.parts:
            setattr(part.owner, part.name, part.own)
        model.truetune_attachment = self.attachment  # type: ignore[assignment]

    def unplug(self, model: nn.Module) -> None:
        """Give the base its places back."""
        for place in self.places.values():
            if place.own.training != place.base.training:
                place.base.train(place.own.training)
            setattr(place.owner, place.name, place.base)
        for part in self.parts:
            if part.base.device != part.own.device:  # the model moved while this one was not part of it
                part.base.data = part.base.data.to(part.own.device)
            setattr(part.owner, part.name, part.base)
        del model.truetune_attachment

    def follow(self) -> None:
        """Move to where the base is, if it moved; all of a model is taken to be in one place."""
        for part in self.parts:
            part.own.data = part.own.data.to(part.base.device)
        first = next(iter(self.layers.values()), None)
        if first is None or _device(first.base) == next((p.device for _, p in first.adapter_parameters()), None):
            return
        for layer in self.layers.values():
            layer.to(_device(layer.base))
        self.__dict__.pop("updates", None)


def hold(model: nn.Module, file: AdapterFile) -> Held:
    """Load the adapter that a folder holds, and take it off the model, which is as it was.

    Args:
        model: without adapters. It is frozen from now on.
    Raises:
        AdapterError: as ``files.load``; or the adapter brings tokens of its own.
    """
    before: _Parameters = [(m, n, p) for m in model.modules() for n, p in m.named_parameters(recurse=False)]
    try:
        files.load(model, file, before_fill=lambda: _own_parts(before))
        held = _taken(model, before)
        if held.attachment.grew_from not in (None, rows_of_table(model)):
            raise AdapterError(
                f"{file.folder} brings tokens of its own, and adapters of one model share its vocabulary",
                ("way out", "load it alone, or merge it into the base first"),
            )
    except BaseException:
        if attachment(model):
            detach(model)
        _give_back(before)
        raise
    for place in held.places.values():  # new layers are as for training
        place.own.train(place.base.training)
    held.unplug(model)
    return held


def _own_parts(before: _Parameters) -> None:
    """Copies of what the file is about to fill in the base; a tensor that two modules share stays one."""
    copies: dict[int, Parameter] = {}
    for owner, name, _ in before:
        parameter = getattr(owner, name)
        if parameter.requires_grad:
            copy = copies.setdefault(id(parameter), Parameter(parameter.detach().clone()))
            setattr(owner, name, copy)


def _give_back(before: _Parameters) -> None:
    for owner, name, parameter in before:
        if getattr(owner, name) is not parameter:
            setattr(owner, name, parameter.requires_grad_(False))


def _taken(model: nn.Module, before: _Parameters) -> Held:
    """What was just attached."""
    attached, found = attachment(model), dict(adapters(model))
    assert attached is not None
    outer = {path: own for path, own in found.items() if not any(path.startswith(f"{other}.base") for other in found)}
    parts = tuple(Part(m, n, p, getattr(m, n)) for m, n, p in before if getattr(m, n) is not p)
    for part in parts:
        part.base.requires_grad_(False)
    return Held(attached, found, _places(model, outer), parts)


def _places(model: nn.Module, outer: Mapping[str, Adapter]) -> dict[str, Place]:
    """Of two adapters on one layer, the outer one takes the place of the layer itself."""
    places = {}
    for path, adapter in outer.items():
        parent, _, name = path.rpartition(".")
        base: nn.Module = adapter
        while isinstance(base, Adapter):
            base = base.base
        places[path] = Place(model.get_submodule(parent), name, base, adapter)
    return places


def _device(module: nn.Module) -> torch.device:
    return next((t.device for t in itertools.chain(module.parameters(), module.buffers())), torch.device("cpu"))
