"""Which examples each optimizer step sees: a pure function of (seed, step), so that resuming needs no state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import overload

import torch
from torch import Tensor

from truetune.data.pack import Batch, collate, group
from truetune.data.token_set import TokenSet
from truetune.ops.rng import Shuffle, order, token_keys

_GROUPED = 1 << 16  # examples that batches are made of together: as lists, all of them may be more than memory has


@dataclass
class StepPlan:
    """The whole run's order.

    Attributes:
        data: the examples.
        batch_size: examples per optimizer step.
        micro_tokens: most tokens in a micro-batch, padding counted.
        packing: see ``data.pack``.
        seed: of the order; each pass over the data has a shuffle of its own.
        steps: optimizer steps in all.
        total: examples in all, over all passes; the last step takes what is left.
    """

    data: TokenSet
    batch_size: int
    micro_tokens: int
    packing: bool
    seed: int
    steps: int
    total: int

    @classmethod
    def build(
        cls, data: TokenSet, *, batch_size: int, micro_tokens: int, packing: bool, seed: int, epochs: float,
        max_steps: int | None,
    ) -> StepPlan:  # fmt: skip
        """Plan ``epochs`` passes, or exactly ``max_steps`` steps when given."""
        total = max(1, round(len(data) * epochs))
        steps = math.ceil(total / batch_size)
        if max_steps is not None:
            steps, total = max_steps, max_steps * batch_size
        return cls(data, batch_size, micro_tokens, packing, seed, steps, total)

    def __post_init__(self) -> None:
        self._shuffled: tuple[int, Shuffle | Tensor] | None = None

    def examples(self, step: int) -> list[int]:
        """The examples of step ``step`` (counted from 0); a step may reach into the next pass."""
        first = step * self.batch_size
        return [self._at(i) for i in range(first, min(first + self.batch_size, self.total))]

    def micro_batches(self, step: int) -> list[Batch]:
        """The micro-batches of a step."""
        examples = self.examples(step)
        lengths = self.data.lengths_of(examples)
        groups = group(lengths, self.micro_tokens, packing=self.packing)
        return [self._collate([examples[i] for i in members], step) for members in groups]

    def _collate(self, examples: list[int], step: int) -> Batch:
        batch = collate(self.data, examples, packing=self.packing)
        lengths = batch.lengths or [batch.input_ids.shape[1]] * len(examples)
        return replace(batch, keys=token_keys(self.seed, step, examples, lengths))

    def _at(self, position: int) -> int:
        epoch, index = divmod(position, len(self.data))
        if self._shuffled is None or self._shuffled[0] != epoch:
            self._shuffled = (epoch, order(len(self.data), self.seed, "order", epoch))
        return int(self._shuffled[1][index])


class _InOrder(Sequence[Batch]):
    """Batches that are made when they are asked for: held-out rows too may be many.

    Batch i holds ``examples[bounds[i]:bounds[i + 1]]``, both int64.
    """

    def __init__(self, data: TokenSet, examples: Tensor, bounds: Tensor, packing: bool) -> None:
        self._data, self._examples, self._bounds, self._packing = data, examples, bounds, packing

    def __len__(self) -> int:
        return len(self._bounds) - 1

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> list[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | list[Batch]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        first, last = self._bounds[range(len(self))[index] :][:2].tolist()
        return collate(self._data, self._examples[first:last].tolist(), packing=self._packing)


def sequential_batches(data: TokenSet, micro_tokens: int, *, packing: bool) -> Sequence[Batch]:
    """All examples once, for evaluation."""
    examples, sizes = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(1, dtype=torch.int64)]
    for first in range(0, len(data), _GROUPED):
        lengths = data.lengths_of(range(first, min(first + _GROUPED, len(data))))
        groups = group(lengths, micro_tokens, packing=packing)
        examples.append(torch.tensor(list(chain.from_iterable(groups)), dtype=torch.int64) + first)
        sizes.append(torch.tensor(list(map(len, groups)), dtype=torch.int64))
    return _InOrder(data, torch.cat(examples), torch.cat(sizes).cumsum(0), packing)
