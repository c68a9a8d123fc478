"""How a step's tokens go through a model: its own code on pages, or its own code text by text."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from truetune.generate.rows import Piece, spans_of
from truetune.generate.terms import Span, project_rows, terms_at
from truetune.models.paged import PagedRow, Pages, on_pages, paged_logits
from truetune.ops.frozen import frozen_weight


class Runner(Protocol):
    """Computes pieces of rows that share an adapter, or whose adapters can share a row."""

    @property
    def pages(self) -> Pages | None:
        """Where keys and values are; None where the model keeps its own."""

    def logits(self, pieces: Sequence[Piece]) -> Tensor:
        """[w, vocab]: what follows each piece that ends its row so far, in their order."""


def paged_row(pieces: Sequence[Piece], pages: Pages, device: torch.device) -> tuple[Tensor, PagedRow, Tensor]:
    """``(ids [n], the row, wanted [w])`` of some pieces, one after the other."""
    ids = torch.tensor([i for piece in pieces for i in piece.ids], device=device)
    row = PagedRow.of([piece.row.segment(piece.count) for piece in pieces], pages)
    ends, at = list[int](), 0
    for piece in pieces:
        at += piece.count
        if piece.ends:
            ends.append(at - 1)
    return ids, row, torch.tensor(ends, dtype=torch.int64, device=device)


class PagedRunner:
    """The model's own code, with keys and values in pages and the maps' adapters row by row."""

    def __init__(self, model: Any, pages: Pages) -> None:
        self.model, self.pages = model, pages

    def logits(self, pieces: Sequence[Piece]) -> Tensor:
        """As ``Runner``."""
        ids, row, wanted = paged_row(pieces, self.pages, self.model.device)
        with on_pages(self.model), beside(self.model, spans_of(pieces)):
            return paged_logits(self.model, ids, row, wanted)


@contextlib.contextmanager
def beside(model: nn.Module, spans: Sequence[Span]) -> Iterator[None]:
    """Inside, the maps that some adapter stands beside compute with it."""
    touched = dict.fromkeys(path for span in spans for path in span.terms)
    sites = [(model.get_submodule(path), path) for path in touched]
    for module, path in sites:
        module.forward = _Beside(module, terms_at(path, spans))
    try:
        yield
    finally:
        for module, _ in sites:
            del module.__dict__["forward"]


class _Beside:
    """Stands in for a map's ``forward``."""

    def __init__(self, module: nn.Module, own: Sequence[Any]) -> None:
        self.module, self.own = module, own

    def __call__(self, x: Tensor) -> Tensor:
        """[1, n, in] -> [1, n, out]; GPT-2's kin hand over rows [n, in]."""
        weight, bias = frozen_weight(self.module), cast("Tensor | None", self.module.bias)
        return project_rows(weight, bias, x.reshape(-1, x.shape[-1]), self.own).view(*x.shape[:-1], -1)


class SingleRunner:
    """The model's own code and its own cache, one text at a time: for models that can't share a row.

    Its rows share nothing, so a step takes as long as all of them one after the other.
    """

    pages = None

    def __init__(self, model: Any) -> None:
        self.model = model

    def logits(self, pieces: Sequence[Piece]) -> Tensor:
        """As ``Runner``."""
        found = []
        for piece in pieces:
            with beside(self.model, spans_of([piece])):
                scores = self._one(piece)
            if piece.ends:
                found.append(scores)
        return torch.stack(found) if found else torch.empty(0)

    def _one(self, piece: Piece) -> Tensor:
        row = piece.row
        ids = piece.ids
        if row.computed and row.state is None:  # a model without a cache: all of it again
            ids = row.ids[: row.computed + piece.count]
        given = {"past_key_values": row.state} if row.state is not None else {}
        out = self.model(input_ids=torch.tensor([ids], device=self.model.device), use_cache=True, **given)
        row.state = getattr(out, "past_key_values", None)
        logits: Tensor = out.logits[0, -1]
        return logits
