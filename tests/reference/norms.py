"""How near a whole tensor must come to the truth: as near as plain torch in the same dtype, plus a hair."""

from __future__ import annotations

import torch
from torch import Tensor


def distance(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference, in units of the norm of what is expected; 0 where both are zeros."""
    error = float((found.double() - expected.double()).norm())
    return error and error / float(expected.double().norm())


def assert_no_worse_as_a_whole(ours: Tensor, plain: Tensor, truth: Tensor, computed: torch.dtype) -> None:
    """The error's norm is at most that of plain torch, and a hair: a rounding; in float32 eight, as sums change order.

    Norms, because which one of some thousand elements is the worst is luck; rounding costs a fifth of eps on average.

    Args:
        computed: the dtype of the computation, which a gradient of a wider tensor does not tell.
    """
    assert ours.dtype == plain.dtype
    hair = (8 if computed == torch.float32 else 1) * torch.finfo(computed).eps / 5
    assert distance(ours, truth) <= distance(plain, truth) + hair
