"""How optimizers turn a gradient into a step: each formula once, on float32 values.

A rule is one step's formula with its scalars, learning rate and bias corrections included; ``optim.rules`` makes them.
With g the gradient, p the parameter, and m, n, v moments:

=========  ==========================================================  ===================================
kind       moments                                                     direction u
=========  ==========================================================  ===================================
adam       m ← keep1 m + add1 g;  v ← keep2 v + add2 g²                m / (√v + eps)
ademamix   as adam;  n ← keep3 n + add3 g                              (m + mix n) / (√v + eps)
momentum   m ← keep1 m + g                                             m
lion       m ← keep2 m + add2 g                                        sign(keep1 m + add1 g), of the m before
rms        v ← keep2 v + add2 g²                                       g / (√v + eps)
=========  ==========================================================  ===================================

First g ← scale g + l2 p, at last p ← decay p - size u. Each operation rounds to float32, in the order of the code
below, which the C kernel keeps: the two give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Kind = Literal["adam", "ademamix", "momentum", "lion", "rms"]

SIGNED: dict[Kind, tuple[bool, ...]] = {
    "adam": (True, False),
    "ademamix": (True, True, False),
    "momentum": (True,),
    "lion": (True,),
    "rms": (True,),
}
"""The moments of a kind in order, and whether each is kept in the signed map or in that of magnitudes."""


@dataclass(frozen=True)
class Rule:
    """One step's formula and scalars, as the table above has them."""

    kind: Kind
    size: float
    keep1: float = 0.0
    add1: float = 0.0
    keep2: float = 0.0
    add2: float = 0.0
    keep3: float = 0.0
    add3: float = 0.0
    mix: float = 0.0
    eps: float = 0.0
    decay: float = 1.0
    l2: float = 0.0
    scale: float = 1.0


def direction_(rule: Rule, p: Tensor, g: Tensor, moments: Sequence[Tensor]) -> Tensor:
    """Advance the moments in place; returns u, which may be one of them.

    An element whose moments are no longer finite starts anew: they become 0, and u is NaN there.

    Args:
        p, g, moments: float32 [n]. ``p`` and ``g`` are only read.
    """
    if rule.scale != 1.0:
        g = g * rule.scale
    if rule.l2:
        g = g + p * rule.l2
    u = _advanced(rule, g, moments)
    if not _finite(*moments):
        lost = ~reduce(torch.add, moments).isfinite()
        u = u.masked_fill(lost, math.nan)
        for m in moments:
            m.masked_fill_(lost, 0.0)
    return u


def apply_(rule: Rule, p: Tensor, u: Tensor) -> Tensor:
    """The step of the parameter, in place; where u is NaN, it stays as it was."""
    unsure = None if _finite(u) else (u.isnan(), p.clone())
    p.mul_(rule.decay).sub_(u * rule.size)
    return p if unsure is None else p.copy_(torch.where(unsure[0], unsure[1], p))


def _finite(*tensors: Tensor) -> bool:
    """Whether all values are; False as well where the sum of their squares overflows. That sum is the fastest test."""
    return math.isfinite(sum(float(torch.dot(t, t)) for t in tensors))


def _advanced(rule: Rule, g: Tensor, moments: Sequence[Tensor]) -> Tensor:
    m = moments[0]
    if rule.kind == "lion":
        u = (m * rule.keep1).add_(g * rule.add1).sign_()
        _mean_(m, rule.keep2, g, rule.add2)
        return u
    if rule.kind == "momentum":
        return m.mul_(rule.keep1).add_(g)
    v = moments[-1]
    v.mul_(rule.keep2).add_((g * rule.add2).mul_(g))
    root = _root(v).add_(rule.eps)
    if rule.kind == "rms":
        return torch.div(g, root, out=root)
    _mean_(m, rule.keep1, g, rule.add1)
    if rule.kind == "adam":
        return torch.div(m, root, out=root)
    n = moments[1]
    _mean_(n, rule.keep3, g, rule.add3)
    return (n * rule.mix).add_(m).div_(root)


def _mean_(m: Tensor, keep: float, g: Tensor, add: float) -> None:
    m.mul_(keep).add_(g * add)


def _root(v: Tensor) -> Tensor:
    """√v, rounded correctly, which torch's own on a CPU is not everywhere: MKL's may be off in the last bit."""
    if not v.is_cpu:
        return v.sqrt()
    with np.errstate(invalid="ignore"):  # NaN is what is wanted then
        return torch.from_numpy(np.sqrt(v.numpy()))
