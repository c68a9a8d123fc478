"""RMS norm (Zhang and Sennrich 2019, arXiv:1910.07467) and layer norm (Ba et al. 2016, arXiv:1607.06450).

One formula, y = (x - m) r (offset + w) + b with r = 1 / sqrt(mean((x - m)²) + eps), where m is the mean of x in the
layer norm and 0 in the RMS norm. It is evaluated in float32 (float64 stays what it is) and rounded once. Functions
whose names end in ``_backward`` and their partners are values only; the differentiable ones are at the end.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from truetune.ops import dispatch
from truetune.ops.native import elementwise


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, *, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """Computes x · rsqrt(mean(x²) + eps) · (offset + weight).

    Args:
        x: [..., h], any floating dtype.
        weight: [h], of any floating dtype, or None for no factor at all.
        offset: 1 in Gemma, whose weights are kept as the distance from 1.
    Returns:
        y, shaped and typed as ``x``; r, [rows] in float32 (float64 for float64), which the backward asks for.
    """
    y, _, rstd = _norm(x, weight, None, eps, offset, centred=False)
    return y, rstd


def rms_norm_backward(
    g: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    *,
    offset: float = 0.0,
    add: Tensor | None = None,
) -> Tensor:
    """The gradient of x, given that of y.

    Args:
        g: [..., h], the gradient of y.
        x, weight, offset: as in the forward.
        rstd: [rows], from the forward.
        add: [..., h], summed in before rounding: the gradient of the residual stream beside the norm.
    Returns:
        [..., h] in the dtype of ``x``.
    """
    return _norm_backward(g, x, weight, None, rstd, offset, add)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Computes ``F.layer_norm(x, [h], weight, bias, eps)``.

    Args:
        x: [..., h], any floating dtype.
        weight, bias: [h], of any floating dtype, or None.
    Returns:
        y, shaped and typed as ``x``; the means and r, [rows] in float32 (float64 for float64), for the backward.
    """
    y, mean, rstd = _norm(x, weight, bias, eps, 0.0, centred=True)
    assert mean is not None
    return y, mean, rstd


def layer_norm_backward(
    g: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, *, add: Tensor | None = None
) -> Tensor:
    """The gradient of x, given that of y; arguments as in ``rms_norm_backward``, and ``mean`` from the forward."""
    return _norm_backward(g, x, weight, mean, rstd, 0.0, add)


def _norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float, *, centred: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    if library := dispatch.native(*(t for t in (x, weight, bias) if t is not None)):
        return elementwise.norm(library, x, weight, bias, eps, offset=offset, centred=centred)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = wide.mean(-1, keepdim=True) if centred else None
    if mean is not None:
        wide = wide - mean
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y = wide * rstd
    if weight is not None:
        y = y * (weight.to(y.dtype) + offset)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.to(x.dtype), None if mean is None else mean.flatten(), rstd.flatten()


def _norm_backward(
    g: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    offset: float,
    add: Tensor | None,
) -> Tensor:
    library = dispatch.native(*(t for t in (g, x, weight, add) if t is not None))
    if library and all(t is None or t.dtype == x.dtype for t in (g, add)):
        return elementwise.norm_backward(library, g, x, weight, mean, rstd, add=add, offset=offset)
    r = rstd.view(*x.shape[:-1], 1)
    z = _normalised(x, mean, rstd)
    u = g.to(r.dtype) if weight is None else g.to(r.dtype) * (weight.to(r.dtype) + offset)
    dx = u - z * (u * z).mean(-1, keepdim=True)
    if mean is not None:
        dx = dx - u.mean(-1, keepdim=True)
    dx = dx * r
    return (dx if add is None else dx + add.to(dx.dtype)).to(x.dtype)


def _normalised(x: Tensor, mean: Tensor | None, rstd: Tensor) -> Tensor:
    """(x - m) r, in the dtype of ``rstd``."""
    shape = (*x.shape[:-1], 1)
    wide = x.to(rstd.dtype)
    return (wide if mean is None else wide - mean.view(shape)) * rstd.view(shape)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float, centred: bool
    ) -> Tensor:
        y, mean, rstd = _norm(x, weight, bias, eps, offset, centred=centred)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.offset = offset
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dx = _norm_backward(g, x, weight, mean, rstd, ctx.offset, None) if needs_x else None
        wide = g.to(rstd.dtype).flatten(0, -2)
        dw = (wide * _normalised(x, mean, rstd).flatten(0, -2)).sum(0).to(weight.dtype) if needs_weight else None
        db = wide.sum(0).to(bias.dtype) if needs_bias else None
        return dx, dw, db, None, None, None


def rms_normed(x: Tensor, weight: Tensor | None, eps: float, *, offset: float = 0.0) -> Tensor:
    """``rms_norm`` for autograd: y alone, differentiable by x and weight."""
    y: Tensor = _Norm.apply(x, weight, None, eps, offset, False)  # type: ignore[no-untyped-call]
    return y


def layer_normed(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """``layer_norm`` for autograd: y alone, differentiable by x, weight and bias."""
    y: Tensor = _Norm.apply(x, weight, bias, eps, 0.0, True)  # type: ignore[no-untyped-call]
    return y
