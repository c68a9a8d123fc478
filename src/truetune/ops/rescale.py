"""A factor for every column of a matrix, and its gradient: what a magnitude costs beside the product that it scales.

    p = f ∘ u,   y = p + c + r;       du = f ∘ dy,   df = Σ dy ∘ u

The factors are in float32 (float64 for float64), and every entry is rounded once. Each function is one pass over memory
in the native tier.
"""

from __future__ import annotations

import torch
from torch import Tensor

from truetune.ops import buffers, dispatch
from truetune.ops.native import rescale
from truetune.ops.native.library import Library

_NEAR = 0.5  # from 1: there bf16's error in f - 1 is at most its error in f


def scale_(u: Tensor, factor: Tensor, *, constant: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """``u`` becomes p; what is returned is y, in memory of its own where it is not p itself.

    Args:
        u, residual: [n, m].
        factor, constant: [m].
    """
    adds = constant is not None or residual is not None
    if library := _library(u, factor, constant, residual):
        y = buffers.empty_like(u) if adds else u
        rescale.rescale(
            library, u, factor, constant=constant, residual=residual, product=u, y=y if adds else None
        )  # fmt: skip
        return y
    times(u, factor, out=u)
    if not adds:
        return u
    y = u if constant is None else u + constant
    return y if residual is None else y + residual


def add_(y: Tensor, u: Tensor, factor: Tensor) -> Tensor:
    """``y`` + f ∘ u, written over ``y``; both [n, m]."""
    if library := _library(y, factor, u):
        rescale.rescale(library, u, factor, residual=y, y=y)
        return y
    return y.add_(times(u, factor))


def backward(g: Tensor, product: Tensor, factor: Tensor, *, is_scaled: bool) -> tuple[Tensor, Tensor]:
    """``(f ∘ g [n, m], the gradient of f [m])``, for g [n, m].

    Args:
        product: u; or p, if ``is_scaled``, which is what there is where u was written over. Then a factor of 0 gets 0.
    """
    if library := _library(g, factor, product):
        return rescale.backward(library, g, product, factor, divides=is_scaled)
    total = torch.mul(g, product, out=buffers.empty_like(g)).sum(0).to(factor.dtype)
    return times(g, factor), torch.where(factor == 0, 0, total / factor) if is_scaled else total


def times(u: Tensor, factor: Tensor, out: Tensor | None = None) -> Tensor:
    """f ∘ u in plain torch, rounded once.

    A CPU takes three times as long over a product of two dtypes. A DoRA's f is near 1, where bf16 is coarse and f - 1
    is not: u + (f - 1) ∘ u, which torch sums in float32.
    """
    out = buffers.empty_like(u) if out is None else out
    if u.device.type == "cpu" and u.dtype.itemsize < 4:
        beyond = factor - 1
        if bool((beyond.abs() <= _NEAR).all()):
            return torch.addcmul(u, u, beyond.to(u.dtype), out=out)
    return torch.mul(u, factor, out=out)


def _library(u: Tensor, factor: Tensor, *others: Tensor | None) -> Library | None:
    given = [t for t in others if t is not None]
    wide = [t for t in given if t.dim() == 2]
    fits = all(t.is_contiguous() and t.dtype == u.dtype and t.shape == u.shape for t in (u, *wide))
    return dispatch.native(u, factor, *given) if fits else None
