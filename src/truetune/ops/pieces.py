"""A tensor's values in row-major order, a dense piece at a time, so that no copy of the whole is ever made."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from truetune.ops import dispatch

_PIECE = 1 << 17  # values: what is computed from them stays in the cache, and is large enough for a few threads


def length(multiple: int) -> int:
    """Values in a piece: a multiple of this."""
    return max(_PIECE // multiple, 1) * multiple


def of(x: Tensor, multiple: int) -> Iterator[tuple[int, Tensor]]:
    """``(start, values)``, values [length(multiple)] or what is left.

    They are float32, and the tensor's own memory where that is possible; what the native tier takes as it is comes
    whole, in its own dtype.
    """
    x = x.detach()
    if x.is_contiguous() and dispatch.native(x):
        yield 0, x.view(-1)
        return
    step = length(multiple)
    for start in range(0, x.numel(), step):
        yield start, _dense(x, start, min(start + step, x.numel())).float()


def _dense(x: Tensor, start: int, stop: int) -> Tensor:
    """Values start, ..., stop - 1 of ``x`` [...], [stop - start]; little more than these is copied, if anything."""
    if x.is_contiguous():
        return x.view(-1)[start:stop]
    if x.dim() == 1:
        return x[start:stop].contiguous()
    each = x[0].numel()
    first, last = start // each, -(-stop // each)
    if last - first > 2:  # most of these rows is wanted
        return x[first:last].reshape(-1)[start - first * each : stop - first * each]
    rows = range(first, last)
    return torch.cat([_dense(x[row], max(start - row * each, 0), min(stop - row * each, each)) for row in rows])
