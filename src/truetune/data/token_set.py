"""Tokenised examples, as they are packed and trained on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from truetune.data.schema import Origin

# What is looked at in one go, at most: examples, and their tokens.
_STRETCH, _TOKENS = 1 << 14, 1 << 22


@dataclass(slots=True)
class TokenSet:
    """Tokenised examples in four flat arrays.

    Attributes:
        tokens: [N] int32, all examples one after another.
        trained: [N] bool, True where the token is one to learn.
        offsets: [rows + 1] int64; example i is ``tokens[offsets[i]:offsets[i + 1]]``.
        origins: the row each example came from, length rows.
        lead: ids in front of every example, which are no data and carry no loss; they stand in none of the arrays.
    """

    tokens: Tensor
    trained: Tensor
    offsets: Tensor
    origins: Sequence[Origin] = field(default_factory=list)
    lead: tuple[int, ...] = ()

    @classmethod
    def from_lists(
        cls, tokens: Sequence[Sequence[int]], trained: Sequence[Sequence[bool]], origins: Sequence[Origin]
    ) -> TokenSet:
        """Build from one list of ids and one of flags per example."""
        lengths = torch.tensor([len(ids) for ids in tokens], dtype=torch.int64)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        flat_tokens = np.fromiter(chain.from_iterable(tokens), np.int32)  # a list of them all is eight times as large
        flat_trained = np.fromiter(chain.from_iterable(trained), np.bool_)
        return cls(torch.from_numpy(flat_tokens), torch.from_numpy(flat_trained), offsets, list(origins))

    @classmethod
    def from_spans(
        cls, tokens: Sequence[Sequence[int]], spans: Sequence[Sequence[tuple[int, int]]], origins: Sequence[Origin]
    ) -> TokenSet:
        """Build from one list of ids per example, and the stretches of it that are trained."""
        made = cls.from_lists(tokens, [], origins)
        made.trained = torch.zeros(len(made.tokens), dtype=torch.bool)
        for begin, stretches in zip(made.offsets.tolist(), spans, strict=False):
            for start, end in stretches:
                made.trained[begin + start : begin + end] = True
        return made

    @classmethod
    def join(cls, parts: Sequence[TokenSet]) -> TokenSet:
        """The examples of all ``parts``, one part after another."""
        parts = [cls.from_lists([], [], []), *parts]
        return cls(
            torch.cat([part.tokens for part in parts]),
            torch.cat([part.trained for part in parts]),
            torch.cat([torch.zeros(1, dtype=torch.int64), *(part.offsets.diff() for part in parts)]).cumsum(0),
            [origin for part in parts for origin in part.origins],
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def virtual(self) -> int:
        """Tokens at the start of every example that are no data."""
        return len(self.lead)

    @property
    def lengths(self) -> Tensor:
        """[rows] int64, tokens per example."""
        return self.offsets.diff() + self.virtual

    def stretches(self) -> Iterator[TokenSet]:
        """All examples, some thousand at a time: what is asked of them all must not hold something for each."""
        first = 0
        while first < len(self):
            offsets = self.offsets[first : first + _STRETCH + 1]
            fitting = int(torch.searchsorted(offsets, int(offsets[0]) + _TOKENS, right=True)) - 1
            yield self.between(first, first + max(1, fitting))  # of long ones fewer, but one in any case
            first += max(1, fitting)

    def longest(self) -> int:
        """Tokens of the longest example; 0 where there is none."""
        return max((int(part.lengths.max()) for part in self.stretches()), default=0)

    def lengths_of(self, examples: Sequence[int]) -> list[int]:
        """Tokens of these examples alone: a list of all lengths may be larger than what a run can hold."""
        index = torch.tensor(examples, dtype=torch.int64)
        found: list[int] = (self.offsets[index + 1] - self.offsets[index] + self.virtual).tolist()
        return found

    def gathered(self, parts: Iterable[TokenSet]) -> TokenSet:
        """What was made of these examples, part by part, kept where these are: in memory, or in files."""
        return TokenSet.join(list(parts))

    def files(self) -> list[str]:
        """The files that examples came from, each once, in the order of the examples."""
        return list(dict.fromkeys(origin.file for origin in self.origins))

    def highest(self) -> int:
        """The largest token id; 0 where there is no token."""
        return int(self.tokens.max()) if len(self.tokens) else 0

    def example(self, index: int) -> tuple[Tensor, Tensor]:
        """Example ``index`` as ``(tokens [n] int32, trained [n] bool)``; views where it has no ``lead``."""
        start, end = int(self.offsets[index]), int(self.offsets[index + 1])
        tokens, trained = self.tokens[start:end], self.trained[start:end]
        if not self.lead:
            return tokens, trained
        flags = torch.cat([torch.zeros(self.virtual, dtype=torch.bool), trained])
        # What had no predecessor has one now, which knows nothing of the text.
        flags[self.virtual : self.virtual + 1] = False
        return torch.cat([torch.tensor(self.lead, dtype=tokens.dtype), tokens]), flags

    def behind(self, ids: Sequence[int]) -> TokenSet:
        """The same examples, each behind these ids, which carry no loss."""
        return replace(self, lead=(*ids, *self.lead))

    def between(self, first: int, last: int) -> TokenSet:
        """Examples ``first`` to ``last`` (which is not among them), as views."""
        last = min(last, len(self))
        start, end = int(self.offsets[first]), int(self.offsets[last])
        offsets, origins = self.offsets[first : last + 1] - start, self.origins[first:last]
        return TokenSet(self.tokens[start:end], self.trained[start:end], offsets, origins, self.lead)

    def kept(self, wanted: Tensor) -> TokenSet:
        """What is left where only the ``wanted`` tokens ([N] bool) stay; of an example without any, nothing is."""
        if bool(wanted.all()):
            return self
        counts = torch.cat([torch.zeros(1, dtype=torch.int64), wanted.cumsum(0)])[self.offsets].diff()
        left = counts > 0
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts[left].cumsum(0)])
        origins = [self.origins[i] for i in left.nonzero()[:, 0].tolist()]
        return TokenSet(self.tokens[wanted], self.trained[wanted], offsets, origins, self.lead)

    def ends(self) -> set[int]:
        """The tokens that end a trained stretch, each once."""
        found: set[int] = set()
        for part in self.stretches():
            after = torch.cat([part.trained[1:], torch.zeros(1, dtype=torch.bool)])
            after[part.offsets[1:-1] - 1] = False
            found.update(part.tokens[part.trained & ~after].tolist())
        return found

    def trained_count(self) -> int:
        """Tokens that carry a loss: the first token of an example has no predecessor to be predicted from."""
        first = self.trained[self.offsets[:-1][self.offsets.diff() > 0]]
        return int(self.trained.sum()) - int(first.sum())
