"""Dropout of what an adapter reads, from the counters of the tokens."""

from __future__ import annotations

from torch import Tensor

from truetune.ops.dropout import dropped
from truetune.ops.rng import current_keys


def dropped_input(x: Tensor, p: float, *, site: int, training: bool) -> Tensor:
    """[..., h] with a share ``p`` of its values dropped while training; ``site`` tells masks of one token apart."""
    if not (p and training):
        return x
    rows = x.shape[:-1].numel()
    return dropped(x.reshape(rows, x.shape[-1]), p, current_keys(rows, x.device), site).view_as(x)
