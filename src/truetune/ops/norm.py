"""RMS norm (Zhang and Sennrich 2019, arXiv:1910.07467) and its gradient.

Evaluated in float32 (float64 stays what it is) and rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from truetune.ops import dispatch
from truetune.ops.native import elementwise


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, *, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """Computes x · r · (offset + weight), with r = rsqrt(mean(x²) + eps).

    Args:
        x: [..., h], any floating dtype.
        weight: [h], of any floating dtype, or None for no factor at all.
        offset: 1 in Gemma, whose weights are kept as the distance from 1.
    Returns:
        y, shaped and typed as ``x``; r, [rows] in float32 (float64 for float64), which the backward asks for.
    """
    if library := dispatch.native(*(t for t in (x, weight) if t is not None)):
        return elementwise.norm(library, x, weight, eps, offset=offset)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y = wide * rstd
    if weight is not None:
        y = y * (weight.to(y.dtype) + offset)
    return y.to(x.dtype), rstd.flatten()


def rms_norm_backward(g: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, *, offset: float = 0.0) -> Tensor:
    """The gradient of x, given that of y.

    Args:
        g: [..., h], the gradient of y.
        x, weight, offset: as in the forward.
        rstd: [rows], from the forward.
    Returns:
        [..., h] in the dtype of ``x``.
    """
    library = dispatch.native(*(t for t in (g, x, weight) if t is not None))
    if library and g.dtype == x.dtype:
        return elementwise.norm_backward(library, g, x, weight, rstd, offset=offset)
    r = rstd.view(*x.shape[:-1], 1)
    z = x.to(r.dtype) * r
    u = g.to(r.dtype) if weight is None else g.to(r.dtype) * (weight.to(r.dtype) + offset)
    return (r * (u - z * (u * z).mean(-1, keepdim=True))).to(x.dtype)
