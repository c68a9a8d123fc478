"""One adapter in memory: what it puts beside a model, kept apart from it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from truetune.adapters import files
from truetune.adapters.base import Adapter
from truetune.adapters.inject import adapters, attachment, detach
from truetune.adapters.methods import trained_parts
from truetune.adapters.parts import full_modules, has_bias, parameters_of
from truetune.adapters.peft_config import saved_modules
from truetune.adapters.targets import output_head
from truetune.adapters.virtual import virtual_ids
from truetune.errors import AdapterError
from truetune.generate.terms import Term, terms_of


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter that can serve.

    Attributes:
        terms: what it does at each map, where it can share a row with others; else None.
        modules: the layers that take the base's places while it alone is computed, where ``terms`` is None.
        parts: parameters of the base, each with the values that the adapter gives it, likewise.
        virtual_ids: what stands in front of every text.
        owner: tells its keys and values from those of any other, an older version of it included.
    """

    name: str
    owner: str
    terms: Mapping[str, Term] | None
    modules: Mapping[str, Adapter] = field(default_factory=dict)
    parts: tuple[tuple[Parameter, Tensor], ...] = ()
    virtual_ids: tuple[int, ...] = ()
    stop_ids: frozenset[int] = frozenset()

    @property
    def nbytes(self) -> int:
        """Its own memory."""
        own = sum(term.nbytes for term in (self.terms or {}).values())
        own += sum(tensor.nbytes for _, tensor in self.parts)
        return own + sum(p.nbytes for adapter in self.modules.values() for p in _own_tensors(adapter))

    @contextlib.contextmanager
    def mounted(self, model: nn.Module) -> Iterator[None]:
        """Inside, the model computes with this adapter; nothing to do for one that has terms."""
        before = [(p, p.data) for p, _ in self.parts]
        try:
            for path, adapter in self.modules.items():
                _put(model, path, adapter)
            for parameter, tensor in self.parts:
                parameter.data = tensor
            yield
        finally:
            for path, adapter in self.modules.items():
                _put(model, path, adapter.base)
            for parameter, data in before:
                parameter.data = data


def load(model: nn.Module, name: str, owner: str, folder: Path) -> LoadedAdapter:
    """Read an adapter's folder and fit it to ``model``, which is as it was afterwards.

    Raises:
        AdapterError: no adapter, a broken file, or one that does not fit this model.
    """
    file = files.read(folder)
    kept = [(p, p.data) for p in _parts(model, file)]
    try:
        for parameter, data in kept:  # filled in place by the loader
            parameter.data = data.clone()
        files.load(model, file)
        attached = attachment(model)
        assert attached is not None
        try:
            if attached.untied:
                raise AdapterError(
                    f"{folder} gives the embedding table and the head, which this model shares, a matrix each",
                    ("way out", "truetune merge, and serve the merged model"),
                )
            return _taken_out(model, name, owner, file, [(p, p.data) for p, _ in kept])
        finally:
            detach(model)
    finally:
        for parameter, data in kept:
            parameter.data = data


def _taken_out(
    model: nn.Module, name: str, owner: str, file: files.AdapterFile, parts: list[tuple[Parameter, Tensor]]
) -> LoadedAdapter:
    modules = {path: adapter.eval() for path, adapter in adapters(model)}
    stop_ids = frozenset(int(i) for i in file.card.get("stop_ids", ()))
    head = output_head(model)  # computes the last token of each row alone: the rows of a step are not its rows
    with torch.no_grad():
        terms = None if parts or any(adapter is head for adapter in modules.values()) else terms_of(modules)
    if terms is not None:
        return LoadedAdapter(name, owner, terms, stop_ids=stop_ids)
    return LoadedAdapter(name, owner, None, modules, tuple(parts), tuple(virtual_ids(model)), stop_ids)


def _parts(model: nn.Module, file: files.AdapterFile) -> list[Parameter]:
    """The parameters of the base that the adapter has values of its own for."""
    names = trained_parts(file.settings)
    names = tuple(n for n in names if n != "bias") if "bias" in names and not has_bias(model) else names
    whole = dict.fromkeys((*saved_modules(model, file.config), *full_modules(model, names)))
    return parameters_of(model, names, tuple(whole))


def _own_tensors(adapter: Adapter) -> list[Tensor]:
    base = {id(t) for t in adapter.base.parameters()}
    return [p for p in adapter.parameters() if id(p) not in base]


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
