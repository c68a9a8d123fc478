"""A text that is being continued: its ids, how many of them are computed, where their keys and values are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from truetune.generate.grammar import Guide
from truetune.generate.loaded import LoadedAdapter
from truetune.generate.pool import page_keys
from truetune.generate.request import Handle, Request
from truetune.generate.sample import Draws
from truetune.generate.terms import Span
from truetune.generate.text import TextStream
from truetune.models.paged import PAGE
from truetune.ops.paged import Segment


@dataclass(eq=False)
class Row:
    """One request, once it has come to the engine."""

    request: Request
    handle: Handle
    text: TextStream
    draws: Draws
    room: int  # new tokens that it may have at most
    guide: Guide | None = None
    ids: list[int] = field(default_factory=list)  # virtual ones, prompt, answer
    adapter: LoadedAdapter | None = None
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    answered: int = 0
    state: Any = None  # a cache of the model's own, where it takes no pages
    cancelled: bool = False
    _held: Tensor | None = None

    @property
    def owner(self) -> str:
        """Whose keys and values they are."""
        return f"adapter/{self.adapter.owner}" if self.adapter else "base"

    @property
    def pending(self) -> int:
        """Tokens that are not computed yet."""
        return len(self.ids) - self.computed

    def segment(self, count: int) -> Segment:
        """Its next ``count`` tokens."""
        if self._held is None or len(self._held) != len(self.pages):
            self._held = torch.tensor(self.pages, dtype=torch.int64)
        return Segment(self.computed, count, self._held)

    def pages_for(self, count: int) -> int:
        """Pages that its next ``count`` tokens need beyond those it has."""
        return max(0, -(-(self.computed + count) // PAGE) - len(self.pages))

    def keys(self) -> list[bytes]:
        """Of its full pages of computed tokens."""
        return page_keys(self.owner, self.ids[: self.computed])

    def forget_pages(self) -> list[int]:
        """Start over: the pages that it held."""
        held, self.pages, self.computed, self._held = self.pages, [], 0, None
        return held


@dataclass(frozen=True)
class Piece:
    """The next tokens of a row that are computed in this step."""

    row: Row
    count: int

    @property
    def ends(self) -> bool:
        """Whether the row's next token can be chosen afterwards."""
        return self.count == self.row.pending

    @property
    def ids(self) -> list[int]:
        """Its tokens."""
        return self.row.ids[self.row.computed : self.row.computed + self.count]


def spans_of(pieces: Iterable[Piece]) -> list[Span]:
    """Which tokens of the pieces, one after the other, belong to which adapter; neighbours of one adapter together."""
    spans: list[Span] = []
    at = 0
    for piece in pieces:
        adapter, end = piece.row.adapter, at + piece.count
        if adapter is not None and adapter.terms:
            last = spans[-1] if spans else None
            if last is not None and last.end == at and last.terms is adapter.terms:
                spans[-1] = Span(last.first, end, last.terms)
            else:
                spans.append(Span(at, end, adapter.terms))
        at = end
    return spans
