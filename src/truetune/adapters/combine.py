"""Several low-rank updates of one layer as one, by weights w: the combinations of PEFT's ``add_weighted_adapter``.

    cat      A = [A_1; A_2; …],  B = [w_1 s_1 B_1, w_2 s_2 B_2, …]        exact: B A = Σ w s B_i A_i; ranks add up
    svd      the nearest product of a rank to Σ w s B_i A_i               (Eckart & Young 1936)
    linear   A = Σ ± √(w s) A_i,  B = Σ √(w s) B_i                        rough: products across adapters appear

``ties``, ``dare-linear``, ``dare-ties`` and ``magnitude-prune`` treat A and B as ``linear`` does, entry by entry as
``combine_entries`` says; with ``-svd`` behind the name they treat the products w s B_i A_i instead, and compress.
Every result has the scale 1. An adapter that has no update on a layer adds nothing to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from truetune.adapters.base import LowRankUpdate
from truetune.adapters.combine_entries import dropped_at_random, in_agreement, largest, weighted_sum
from truetune.errors import AdapterError
from truetune.ops import lowrank

Entries = Callable[[Sequence[Tensor], Sequence[float]], Tensor]


@dataclass(frozen=True)
class Combination:
    """How updates become one.

    Attributes:
        kind: as ``--combine`` names it.
        rank: of the result, for those that compress; None for the largest of the parts.
        density: the share of entries that is kept, for those that drop some.
    """

    kind: str = "cat"
    rank: int | None = None
    density: float = 0.5

    @property
    def compresses(self) -> bool:
        """Whether the result's rank is chosen."""
        return self.kind.endswith("svd")

    def of(
        self, updates: Sequence[LowRankUpdate], weights: Sequence[float], draws: torch.Generator | None = None
    ) -> LowRankUpdate:
        """The combination of one layer's updates, all of one kind of layer.

        Args:
            draws: what DARE drops is drawn from.
        Raises:
            AdapterError: ranks that differ, where A and B are added entry by entry.
        """
        updates = [_wide(update) for update in updates]
        if self.kind == "cat":
            return _beside(updates, weights)
        shift, rank = _shift(updates, weights), self.rank or max(len(update.a) for update in updates)
        if self.kind == "svd":
            return _compressed(_beside(updates, weights), rank)
        entries = self._entries(draws)
        if self.compresses:
            return replace(_of_products(updates, weights, entries, rank, draws), shift=shift)
        return replace(_of_factors(updates, weights, entries), shift=shift)

    def _entries(self, draws: torch.Generator | None) -> Entries:
        kind = self.kind.removesuffix("-svd")
        if kind == "linear":
            return weighted_sum
        keep = partial(largest, density=self.density)
        if kind.startswith("dare"):
            keep = partial(dropped_at_random, density=self.density, draws=draws)
        merge = in_agreement if kind.endswith("ties") else weighted_sum
        return lambda tensors, weights: merge([keep(tensor) for tensor in tensors], weights)


def _wide(update: LowRankUpdate) -> LowRankUpdate:
    shift = None if update.shift is None else update.shift.detach().float()
    return replace(update, a=update.a.detach().float(), b=update.b.detach().float(), shift=shift)


def _beside(updates: Sequence[LowRankUpdate], weights: Sequence[float]) -> LowRankUpdate:
    a = torch.cat([update.a for update in updates])
    b = torch.cat([update.b * (w * update.scale) for update, w in zip(updates, weights, strict=True)], dim=1)
    return replace(updates[0], a=a, b=b, scale=1.0, shift=_shift(updates, weights))


def _shift(updates: Sequence[LowRankUpdate], weights: Sequence[float]) -> Tensor | None:
    """Σ w s β."""
    found = [(u.shift, w * u.scale) for u, w in zip(updates, weights, strict=True) if u.shift is not None]
    return weighted_sum([shift for shift, _ in found], [weight for _, weight in found]) if found else None


def _compressed(update: LowRankUpdate, rank: int) -> LowRankUpdate:
    """The nearest update of a rank, from the thin factors alone: with B = Q R and Aᵀ = P S, of R Sᵀ [r, r]."""
    q, r = torch.linalg.qr(update.b.flatten(1))
    p, s = torch.linalg.qr(update.a.flatten(1).T)
    inner_b, inner_a = lowrank.best(r @ s.T, rank)
    return _as_factors(update, q @ inner_b, inner_a @ p.T)


def _of_products(
    updates: Sequence[LowRankUpdate],
    weights: Sequence[float],
    entries: Entries,
    rank: int,
    draws: torch.Generator | None,
) -> LowRankUpdate:
    """Of s B A whole, [out, in]."""
    products = [(u.b.flatten(1) @ u.a.flatten(1)) * u.scale for u in updates]
    return _as_factors(updates[0], *lowrank.best(entries(products, weights), rank, draws))


def _as_factors(like: LowRankUpdate, b: Tensor, a: Tensor) -> LowRankUpdate:
    """B [out, r] and A [r, in] in the shapes of a layer's kind."""
    rank = len(a)
    shape_a, shape_b = (rank, *like.a.shape[1:]), (len(b), rank, *like.b.shape[2:])
    return replace(like, a=a.reshape(shape_a).contiguous(), b=b.reshape(shape_b).contiguous(), scale=1.0)


def _of_factors(updates: Sequence[LowRankUpdate], weights: Sequence[float], entries: Entries) -> LowRankUpdate:
    """Each factor takes the square root of w s, and A its sign."""
    if len({update.a.shape for update in updates}) > 1:
        ranks = ", ".join(str(len(update.a)) for update in updates)
        raise AdapterError(
            f"ranks {ranks}: A and B can be added entry by entry only where they have one shape",
            ("way out", "--combine cat, which is exact, or svd --rank N"),
        )
    factors = [w * update.scale for update, w in zip(updates, weights, strict=True)]
    roots = [math.sqrt(abs(factor)) for factor in factors]
    signed = [math.copysign(root, factor) for root, factor in zip(roots, factors, strict=True)]
    a, b = entries([update.a for update in updates], signed), entries([update.b for update in updates], roots)
    return replace(updates[0], a=a, b=b, scale=1.0)
