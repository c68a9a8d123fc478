"""The low-rank update of a linear map, y = W x + b + s B A x (Hu et al. 2021, arXiv:2106.09685, section 4)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def scale(alpha: float, rank: int, *, rank_stabilised: bool) -> float:
    """s = alpha / r, or alpha / sqrt(r) when rank-stabilised (Kalajdzievski 2023, arXiv:2312.03732)."""
    return alpha / (math.sqrt(rank) if rank_stabilised else rank)


def linear(x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """s B A x.

    Args:
        x: [..., in].
        a: [r, in], cast to the dtype of ``x``.
        b: [out, r], likewise.
    Returns:
        [..., out] in the dtype of ``x``.
    """
    return F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype)) * scale


def lookup(ids: Tensor, a: Tensor, b: Tensor, scale: float, *, dtype: torch.dtype) -> Tensor:
    """s B A[:, id]: the low-rank update of embedding rows.

    Args:
        ids: [...] int64.
        a: [r, vocab].
        b: [dim, r].
    Returns:
        [..., dim] in ``dtype``.
    """
    return F.linear(F.embedding(ids, a.T.to(dtype)), b.to(dtype)) * scale


def fold(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W + s B A, rounded once.

    Args:
        weight: [out, in], any floating dtype. Not modified.
        a: [r, in].
        b: [out, r].
    Returns:
        A new [out, in] tensor in the dtype of ``weight``. The sum is formed in float32 (float64 for float64): in bf16
        the update would be rounded twice and mostly lost.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    return torch.add(weight.to(wide), b.to(wide) @ a.to(wide), alpha=scale).to(weight.dtype)
