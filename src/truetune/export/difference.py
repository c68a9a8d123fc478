"""How far two versions of a weight are from each other, without a third one in memory."""

from __future__ import annotations

import torch
from torch import Tensor

_PIECE = 1 << 18  # values in float32 at a time: 1 MB each of the two and of their difference


def squared(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """``(|found - expected|², |expected|²)`` in the Frobenius norm.

    Args:
        found, expected: [..., rows, columns], any floating dtypes and strides; widened to float32 some rows at a time.
    """
    found, expected = found.flatten(0, -2), expected.flatten(0, -2)
    rows = max(1, _PIECE // max(1, expected.shape[1]))
    error = norm = 0.0
    for one, other in zip(torch.split(found, rows), torch.split(expected, rows), strict=True):
        wide = other.float()
        norm += float(wide.square().sum())
        error += float((one.float() - wide).square_().sum())
    return error, norm
