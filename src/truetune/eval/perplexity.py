"""Held-out loss, perplexity and next-token accuracy over the tokens that training would learn."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from truetune.data.pack import Batch
from truetune.ops.loss import cross_entropy_sum


@dataclass(frozen=True)
class Evaluation:
    """Means over ``tokens`` trained tokens."""

    loss: float  # nats per token
    accuracy: float  # share of tokens that are the model's first choice
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))


@torch.no_grad()
def evaluate(
    scores_of: Callable[[Batch], Iterable[tuple[Tensor, Tensor]]],
    batches: Sequence[Batch],
    *,
    autocast: Callable[[], AbstractContextManager[object]],
) -> Evaluation:
    """Run over the batches; sums are taken in float64, so their order does not show.

    Args:
        scores_of: a batch's logits and targets, a few rows at a time: ([n, vocab], [n] int64).
    """
    total, right, count = 0.0, 0, 0
    for batch in batches:
        if not batch.trained:
            continue
        with autocast():
            for scores, targets in scores_of(batch):
                total += float(cross_entropy_sum(scores, targets))
                right += int((scores.argmax(-1) == targets).sum())
        count += batch.trained
    return Evaluation(total / max(1, count), right / max(1, count), count)
