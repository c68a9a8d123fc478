"""A pair of values and their gradient as one function for autograd, so that ``gradcheck`` can hold it to its word."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Forward = Callable[..., tuple[Tensor, tuple[Tensor, ...]]]  # inputs → the result, and what the backward asks for
Backward = Callable[..., tuple[Tensor, ...]]  # (gradient, *what was asked for) → the gradient of each input


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, forward: Forward, backward: Backward, *inputs: Tensor) -> Tensor:
        y, kept = forward(*inputs)
        ctx.save_for_backward(*kept)
        ctx.backward_of = backward
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.backward_of(g, *ctx.saved_tensors)


def joined(forward: Forward, backward: Backward) -> Callable[..., Tensor]:
    """``forward`` for autograd, with ``backward`` as its derivative."""
    return lambda *inputs: _Joined.apply(forward, backward, *inputs)  # type: ignore[no-any-return, no-untyped-call]
