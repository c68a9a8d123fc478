"""The C kernels of products with one thin side, on tensors: on the CPU, bfloat16, with a tile unit (AMX)."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from truetune.ops import buffers
from truetune.ops.native.library import Library

_P, _I64, _I32, _U32, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_uint32, ctypes.c_float


Dropped = tuple[Tensor, int, int, float] | None
"""Keys, threshold, site and factor of a mask, as ``ops.dropout`` defines them."""


class _Call(ctypes.Structure):
    """tt_thin_call of thin_amx.h."""

    _fields_ = (
        *((name, _P) for name in ("wide", "left", "right", "residual", "down", "across", "keys", "scratch")),
        *((name, _I64) for name in ("rows", "columns", "rank", "down_row")),
        *(("scale", _F), ("kept", _F), ("threshold", _I32), ("site", _U32), ("turned", _I32)),
    )


@cache
def has_tiles(library: Library) -> bool:
    """Whether the kernels are there."""
    return bool(library.functions.tt_thin_tiles())


@cache
def _functions(library: Library) -> ctypes.CDLL:
    """The library's functions with their argument types told, once."""
    functions = library.functions
    functions.tt_thin_scratch.argtypes, functions.tt_thin_scratch.restype = (_I64, _I64), _I64
    for function in (functions.tt_thin_products, functions.tt_thin_add):
        function.argtypes, function.restype = (_P,), None
    return functions


def _address(tensor: Tensor | None, *shape: int) -> int | None:
    """Where a dense bfloat16 tensor of this shape starts; None for none."""
    if tensor is None:
        return None
    assert tensor.dtype == torch.bfloat16
    assert tensor.shape == shape
    assert tensor.is_contiguous()
    return tensor.data_ptr()


def _call(
    library: Library, wide: Tensor, rank: int, left: Tensor | None, right: Tensor | None, dropped: Dropped
) -> _Call:
    rows, columns = wide.shape
    call = _Call(rows=rows, columns=columns, rank=rank, wide=_address(wide, rows, columns), scale=1.0, kept=1.0)
    call.left, call.right = _address(left, rows, rank), _address(right, columns, rank)
    if dropped is not None:
        keys, call.threshold, call.site, call.kept = dropped
        assert keys.dtype == torch.int64
        assert keys.shape == (rows,)
        assert keys.is_contiguous()
        call.keys = keys.data_ptr()
    needed = _functions(library).tt_thin_scratch(rows, columns)
    call.scratch = buffers.scratch(1, needed, torch.int8, wide.device).data_ptr()
    return call


def add(
    library: Library, wide: Tensor, left: Tensor, right: Tensor, *, residual: Tensor | None, dropped: Dropped
) -> None:
    """``wide`` [n, m] += drop(left [n, r] rightᵀ [r, m]) + residual [n, m]."""
    call = _call(library, wide, left.shape[1], left, right, dropped)
    call.residual = _address(residual, *wide.shape)
    _functions(library).tt_thin_add(ctypes.byref(call))


def products(library: Library, wide: Tensor, left: Tensor, right: Tensor, *, into: Tensor, scale: float) -> Tensor:
    """``into`` [n, r], whose rows are dense, = wide right [m, r]; returns scale · wideᵀ left, [m, r] float32."""
    rank = left.shape[1]
    call, across = _call(library, wide, rank, left, right, None), torch.empty(wide.shape[1], rank)
    _to(call, into, rank)
    call.across, call.scale, call.turned = across.data_ptr(), scale, True
    _functions(library).tt_thin_products(ctypes.byref(call))
    return across


def down(library: Library, wide: Tensor, right: Tensor, dropped: Dropped) -> Tensor:
    """drop(wide) [n, m] right [m, r], [n, r] bfloat16."""
    rank = right.shape[1]
    call, into = _call(library, wide, rank, None, right, dropped), wide.new_empty(len(wide), rank)
    _to(call, into, rank)
    _functions(library).tt_thin_products(ctypes.byref(call))
    return into


def across(library: Library, left: Tensor, wide: Tensor, dropped: Dropped) -> Tensor:
    """leftᵀ [r, n] drop(wide) [n, m], [r, m] float32."""
    rank = left.shape[1]
    call, found = _call(library, wide, rank, left, None, dropped), torch.empty(rank, wide.shape[1])
    call.across = found.data_ptr()
    _functions(library).tt_thin_products(ctypes.byref(call))
    return found


def _to(call: _Call, into: Tensor, rank: int) -> None:
    assert into.shape == (call.rows, rank)
    assert into.dtype == torch.bfloat16
    assert into.stride(1) == 1
    call.down, call.down_row = into.data_ptr(), into.stride(0)
