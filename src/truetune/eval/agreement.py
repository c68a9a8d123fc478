"""How far two models are from each other on the same text: logits, probabilities, first choices, losses.

All of it is computed position by position in float64, so that what is measured is the models and not the measure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

_ROWS = 16  # positions in float64 at a time: 150,000 tokens of vocabulary are 1.2 MB each


@dataclass(frozen=True)
class Agreement:
    """One model against another over ``positions`` tokens.

    Attributes:
        max_delta: the largest difference of any two logits; infinite where one is no number.
        mean_kl: KL(expected || found) in nats, the mean over the positions.
        top1: share of the positions where the expected model's first choice is the found one's too; of tokens that
            are equally likely, each is.
        largest: the largest absolute logit of the expected model: the scale that ``max_delta`` is seen on.
        positions: how many were compared.
        finite: whether every logit of the found model is a number.
        gaps: for each position with another first choice, how much likelier the expected model holds its own, in nats.
    """

    max_delta: float
    mean_kl: float
    top1: float
    largest: float
    positions: int
    finite: bool = True
    gaps: tuple[float, ...] = ()

    def top1_within(self, nats: float) -> float:
        """Share of the positions where the found model chooses what the expected one holds about as likely."""
        apart = sum(gap > nats for gap in self.gaps)
        return 1.0 - apart / self.positions if self.positions and self.finite else self.top1


def agreement(found: Tensor, expected: Tensor) -> Agreement:
    """Compare logits.

    Args:
        found, expected: [n, vocab], any floating dtype; of vocabularies of two sizes (one may be padded), the tokens
            that both have.
    """
    shared = min(found.shape[1], expected.shape[1])
    parts = [
        _part(one[:, :shared].double(), other[:, :shared].double())
        for one, other in zip(torch.split(found, _ROWS), torch.split(expected, _ROWS), strict=True)
    ]
    return pooled(parts)


def pooled(parts: Sequence[Agreement]) -> Agreement:
    """Several texts as one: the largest of the largest, means over all positions."""
    count = sum(part.positions for part in parts)

    def mean(values: Sequence[float]) -> float:
        return math.fsum(v * part.positions for v, part in zip(values, parts, strict=True)) / count if count else 0.0

    return Agreement(
        max((part.max_delta for part in parts), default=0.0),
        mean([part.mean_kl for part in parts]),
        mean([part.top1 for part in parts]),
        max((part.largest for part in parts), default=0.0),
        count,
        all(part.finite for part in parts),
        tuple(gap for part in parts for gap in part.gaps),
    )


def recorded_agreement(found: Tensor, ids: Tensor, log_probabilities: Tensor) -> Agreement:
    """Compare logits with what was written down of the expected model: its k likeliest tokens at each position.

    Args:
        found: [n, vocab] logits.
        ids: [n, k] int64, likeliest first.
        log_probabilities: [n, k], of these tokens by the expected model.
    Returns:
        Of log-probabilities in place of logits; the divergence is over the k tokens and what they leave, as one token.
    """
    if not bool(torch.isfinite(found).all()):
        return _not_finite(len(found), 0.0)
    ours = F.log_softmax(found.double(), dim=-1).gather(1, ids)
    theirs = log_probabilities.double()
    pairs = [(ours, theirs), (_rest(ours), _rest(theirs))]
    kl = sum((other.exp() * (other - one)).sum(1) for one, other in pairs)
    assert isinstance(kl, Tensor)
    return Agreement(
        float((ours - theirs).abs().max()) if len(found) else 0.0,
        max(0.0, float(kl.mean())) if len(found) else 0.0,
        _chosen(found, ids[:, 0]) if len(found) else 1.0,
        float(theirs.abs().max()) if len(found) else 0.0,
        len(found),
        gaps=_recorded_gaps(found, ids, theirs),
    )


def _recorded_gaps(found: Tensor, ids: Tensor, log_probabilities: Tensor) -> tuple[float, ...]:
    """The same by what was written down: a token that was not is behind by more than the last one that was."""
    if not len(found):
        return ()
    chosen = found.argmax(-1, keepdim=True)
    behind = log_probabilities[:, :1] - torch.where(ids == chosen, log_probabilities, -math.inf)
    same = found.gather(1, ids[:, :1])[:, 0] == found.max(-1).values
    return tuple(behind.min(-1).values[~same].tolist())


def loss_sum(scores: Tensor, targets: Tensor) -> float:
    """The sum of the cross-entropies in nats; infinite where a logit is no number.

    Args:
        scores: [n, vocab]; targets: [n] int64.
    """
    total = float(F.cross_entropy(scores.double(), targets, reduction="sum"))
    return total if math.isfinite(total) else math.inf


def top_log_probabilities(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``(ids [n, k] int64, log-probabilities [n, k] float64)`` of the likeliest tokens, likeliest first."""
    values, ids = F.log_softmax(scores.double(), dim=-1).topk(min(count, scores.shape[1]), dim=-1)
    return ids, values


def _part(found: Tensor, expected: Tensor) -> Agreement:
    largest = float(expected.abs().max())
    if not bool(torch.isfinite(found).all()):
        return _not_finite(len(found), largest)
    log_p, log_q = F.log_softmax(expected, dim=-1), F.log_softmax(found, dim=-1)
    return Agreement(
        float((found - expected).abs().max()),
        max(0.0, float((log_p.exp() * (log_p - log_q)).sum(-1).mean())),
        _chosen(found, expected.argmax(-1)),
        largest,
        len(found),
        gaps=_gaps(found, log_p),
    )


def _gaps(found: Tensor, expected: Tensor) -> tuple[float, ...]:
    """How far what was found likeliest is behind, where it is not the expected model's first choice."""
    first = expected.argmax(-1, keepdim=True)
    behind = expected.max(-1).values - expected.gather(1, found.argmax(-1, keepdim=True))[:, 0]
    same = found.gather(1, first)[:, 0] == found.max(-1).values
    return tuple(behind[~same].tolist())


def _chosen(found: Tensor, first: Tensor) -> float:
    """Share of the rows where a token is among the likeliest; low precision makes many logits equal."""
    return float((found.gather(1, first[:, None])[:, 0] == found.max(-1).values).double().mean())


def _not_finite(positions: int, largest: float) -> Agreement:
    return Agreement(math.inf, math.inf, 0.0, largest, positions, finite=False)


def _rest(log_probabilities: Tensor) -> Tensor:
    """[n, 1]: the logarithm of what the given tokens leave of 1."""
    left = (1.0 - log_probabilities.exp().sum(1, keepdim=True)).clamp(min=1e-12)
    return left.log()
