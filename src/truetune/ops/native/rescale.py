"""The C kernels of a factor for every column, on tensors: on the CPU, float32 or bfloat16, dense."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from truetune.ops import buffers
from truetune.ops.native.library import Library

_CODE = {torch.float32: 0, torch.bfloat16: 1}  # TT_FLOAT32 and TT_BFLOAT16 of simd.h
_P, _I64, _I32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


@cache
def _functions(library: Library) -> ctypes.CDLL:
    """The library's functions with their argument types told, once."""
    functions = library.functions
    functions.tt_rescale.argtypes = (*[_P] * 6, _I64, _I64, _I32)
    functions.tt_rescale_backward.argtypes = (*[_P] * 5, _I64, _I64, _I32, _I32)
    functions.tt_rescale_bursts.argtypes, functions.tt_rescale_bursts.restype = (_I64,), _I64
    functions.tt_rescale.restype = functions.tt_rescale_backward.restype = None
    return functions


def _address(tensor: Tensor | None, like: Tensor) -> int | None:
    """Where a tensor that is shaped, typed and laid out as ``like`` starts; None for none."""
    if tensor is None:
        return None
    assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == (like.shape, like.dtype, True)
    return tensor.data_ptr()


def _per_column(tensor: Tensor, like: Tensor) -> Tensor:
    assert tensor.shape == like.shape[1:]
    return tensor if tensor.dtype == torch.float32 and tensor.is_contiguous() else tensor.float().contiguous()


def rescale(
    library: Library,
    u: Tensor,
    factor: Tensor,
    *,
    constant: Tensor | None = None,
    residual: Tensor | None = None,
    product: Tensor | None = None,
    y: Tensor | None = None,
) -> None:
    """Writes f ∘ u into ``product``, and f ∘ u + constant + residual into ``y``, where they are given; all [n, m]."""
    factor, constant = _per_column(factor, u), None if constant is None else _per_column(constant, u)
    _functions(library).tt_rescale(
        _address(u, u), factor.data_ptr(), None if constant is None else constant.data_ptr(), _address(residual, u),
        _address(product, u), _address(y, u), *u.shape, _CODE[u.dtype],
    )  # fmt: skip


def backward(library: Library, g: Tensor, product: Tensor, factor: Tensor, *, divides: bool) -> tuple[Tensor, Tensor]:
    """See ``ops.rescale.backward``; the gradient of the factors is in float32."""
    inner, factor = buffers.empty_like(g), _per_column(factor, g)
    bursts = _functions(library).tt_rescale_bursts(len(g))
    sums = torch.empty(bursts, g.shape[1]) if bursts else torch.zeros(1, g.shape[1])
    _functions(library).tt_rescale_backward(
        _address(g, g), _address(product, g), factor.data_ptr(), inner.data_ptr(), sums.data_ptr(),
        *g.shape, _CODE[g.dtype], divides,
    )  # fmt: skip
    return inner, sums[0]
