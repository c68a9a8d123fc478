"""One adapter that can serve: what it adds row by row where it can share a row with others, else all of its layers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from truetune.adapters.base import Adapter
from truetune.adapters.files import AdapterFile
from truetune.adapters.held import Held, hold
from truetune.adapters.targets import output_head
from truetune.adapters.virtual import virtual_ids
from truetune.generate.terms import Term, terms_of

Stamp = tuple[tuple[str, int, int], ...]
"""Tells one state of an adapter's files from another."""


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter in memory.

    Attributes:
        owner: tells its keys and values from those of any other, an older version of it included.
        stamp: of the files that it was read from.
        terms: what it does at each map, where it can share a row with others; else None.
        held: what takes the base's places while it alone is computed, where ``terms`` is None.
        virtual_ids: what stands in front of every text.
    """

    name: str
    owner: str
    stamp: Stamp
    terms: Mapping[str, Term] | None
    held: Held | None = None
    virtual_ids: tuple[int, ...] = ()
    stop_ids: frozenset[int] = frozenset()

    @property
    def nbytes(self) -> int:
        """Its own memory."""
        own = sum(term.nbytes for term in (self.terms or {}).values())
        if self.held is not None:
            own += sum(part.own.nbytes for part in self.held.parts)
            own += sum(p.nbytes for adapter in self.held.layers.values() for p in _own_tensors(adapter))
        return own

    @contextlib.contextmanager
    def mounted(self, model: nn.Module) -> Iterator[None]:
        """Inside, the model computes with this adapter; nothing to do for one that has terms."""
        if self.held is None:
            yield
            return
        self.held.plug(model)
        try:
            yield
        finally:
            self.held.unplug(model)


def fit(model: nn.Module, file: AdapterFile, *, name: str, owner: str, stamp: Stamp) -> LoadedAdapter:
    """Fit an adapter to ``model``, which is as it was afterwards.

    Raises:
        AdapterError: it does not fit this model.
    """
    stop_ids = frozenset(int(i) for i in file.card.get("stop_ids", ()))
    held = hold(model, file)
    with torch.no_grad():
        layers = held.singly if _goes_row_by_row(model, held) else None
        terms = None if layers is None else terms_of(layers)
    if terms is not None:
        return LoadedAdapter(name, owner, stamp, terms, stop_ids=stop_ids)
    found = LoadedAdapter(name, owner, stamp, None, held, stop_ids=stop_ids)
    with found.mounted(model):
        return LoadedAdapter(name, owner, stamp, None, held, tuple(virtual_ids(model)), stop_ids)


def _goes_row_by_row(model: nn.Module, held: Held) -> bool:
    head = output_head(model)  # computes the last token of each row alone: the rows of a step are not its rows
    return not held.parts and all(place.base is not head for place in held.places.values())


def _own_tensors(adapter: Adapter) -> list[Tensor]:
    base = {id(t) for t in adapter.base.parameters()}
    return [p for p in adapter.parameters() if id(p) not in base]
