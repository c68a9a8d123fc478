"""Products with one thin side, a rank: what a low-rank path costs beside its frozen product.

They read much memory for little arithmetic. On a CPU with a tile unit each pass over a wide matrix does all that is
wanted of it, and sums are rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from truetune.ops import dispatch
from truetune.ops.dropout import Mask
from truetune.ops.native import thin
from truetune.ops.native.library import Library


def add(y: Tensor, h: Tensor, b: Tensor, *, residual: Tensor | None = None, mask: Mask | None = None) -> Tensor:
    """``y`` + drop(h bᵀ) + residual, written over ``y``.

    Args:
        y, residual: [n, m].
        h: [n, r], of the dtype of ``y``.
        b: [m, r], likewise.
    """
    if library := _library(y, h, b, *(() if residual is None else (residual,))):
        thin.add(library, y, h, b, residual=residual, dropped=_words(mask))
        return y
    y = y.addmm_(h, b.T) if mask is None else y.add_(mask.on(h @ b.T))
    return y if residual is None else y.add_(residual)


def down(x: Tensor, a: Tensor, mask: Mask | None = None) -> Tensor:
    """Computes drop(x) aᵀ, [n, r], of x [n, m] and a [r, m]."""
    if library := _library(x, a):
        return thin.down(library, x, a.T.contiguous(), _words(mask))
    return (x if mask is None else mask.on(x)) @ a.T


def backward(
    grads: Sequence[Tensor], h: Sequence[Tensor], b: Sequence[Tensor], scales: Sequence[float]
) -> tuple[Tensor, list[Tensor]]:
    """``(dh [n, R], of all paths side by side; db of each, [m, r])`` of y_i = h_i b_iᵀ: dh = g b, db = scale · gᵀ h.

    Args:
        grads: g of each path, [n, m] of one dtype.
        h, b: as in ``add``, of each path.
        scales: what each b was multiplied by before.
    """
    ranks = [low.shape[1] for low in h]
    dh, of_b = grads[0].new_empty(len(grads[0]), sum(ranks)), list[Tensor]()
    parts = torch.split(dh, ranks, dim=1)
    for g, low, wide, scale, part in zip(grads, h, b, scales, parts, strict=True):
        if library := _library(g, low, wide):
            of_b.append(thin.products(library, g, low, wide, into=part, scale=scale))
        else:
            part.copy_(g @ wide)
            of_b.append((low.T @ g).T * scale)
    return dh, of_b


def across(h: Tensor, x: Tensor, mask: Mask | None = None) -> Tensor:
    """Computes hᵀ drop(x), [r, m], of h [n, r] and x [n, m]; in float32 where it was summed so."""
    if library := _library(x, h):
        return thin.across(library, h, x, _words(mask))
    return h.T @ (x if mask is None else mask.on(x))


def _words(mask: Mask | None) -> thin.Dropped:
    return None if mask is None else (mask.keys.contiguous(), mask.threshold, mask.word, mask.kept)


def _library(*tensors: Tensor) -> Library | None:
    library = dispatch.native(*tensors)
    fits = all(t.dtype == torch.bfloat16 and t.is_contiguous() and t.numel() for t in tensors)
    return library if library and fits and thin.has_tiles(library) else None
