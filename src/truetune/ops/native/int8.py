"""The C kernels of LLM.int8(), on tensors: on the CPU, float32 or bfloat16. C trusts sizes: they are asserted here."""

from __future__ import annotations

import ctypes
from functools import cache, lru_cache

import torch
from torch import Tensor

from truetune.ops import buffers
from truetune.ops.native.library import Library

BLOCK, STEP = 32, 64  # INT8_SIDE, and the codes of a step, of int8_blocks.h
_CODE = {torch.float32: 0, torch.bfloat16: 1}  # TT_FLOAT32 and TT_BFLOAT16 of simd.h
_ROWS = 2304  # of a gradient that is laid out at a time: three units of int8_amx.h
_CPU = torch.device("cpu")

_P, _I64, _I32, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float
_ARGUMENTS = {
    "tt_int8_quantize": (_P, _P, _P, _P, _I64, _I64, _I32, _I32, _F),
    "tt_int8_apart": (_P, _P, _P, _P, _I64, _I64, _I64, _I32, _I32),
    "tt_int8_dequantize": (_P, _P, _P, _I64, _I64, _I32),
    "tt_int8_rescale": (_P, _P, _P, _P, _P, _P, _I64, _I64, _I64, _I32, _I32),
    "tt_int8_lay": (_P, _P, _P, _I64, _I64, _I32),
    "tt_int8_product": (_P,),
}
_RESULTS = {"tt_int8_quantize": _I32, "tt_int8_product": _I64}


class _Call(ctypes.Structure):
    """tt_int8_call of int8_amx.h."""

    _fields_ = (
        *((name, _P) for name in ("left", "values", "codes", "outliers", "left_scale", "right_scale", "bias")),
        *((name, _P) for name in ("result", "scratch")),
        *((name, _I64) for name in ("rows", "inner", "outer", "outlier_count")),
        *((name, _I32) for name in ("dtype", "add", "workers")),
    )


@cache
def has_tiles(library: Library) -> bool:
    """Whether products run on the CPU's tile unit (AMX); ``forward`` and ``backward`` are there then."""
    return bool(library.functions.tt_int8_tiles())


@cache
def _functions(library: Library) -> ctypes.CDLL:
    """The library's functions with their argument types told, once."""
    for name, types in _ARGUMENTS.items():
        if hasattr(library.functions, name):
            function = getattr(library.functions, name)
            function.argtypes = types
            function.restype = _RESULTS.get(name)
    return library.functions


def _address(tensor: Tensor | None, dtype: torch.dtype, *shape: int) -> int | None:
    """Where a dense tensor of this type and shape starts; None for none."""
    if tensor is None:
        return None
    assert tensor.dtype == dtype
    assert tensor.shape == shape
    assert tensor.is_contiguous()
    return tensor.data_ptr()


def _up(n: int, to: int) -> int:
    return -(-n // to) * to


def quantize(
    library: Library, x: Tensor, limit: float, *, apart: bool, blocked: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``(codes, scale, outlying columns)`` of the rows of x [n, in]: codes [n, in], or as ``unblocked`` takes them.

    Args:
        limit: values of this size and more have no codes.
        apart: the columns they are in are returned, [r] int64, or None if there is none. Else their rows have a scale
            of NaN, as those with a NaN always have.
    """
    x = x.contiguous()
    rows, columns = x.shape
    codes = _codes(_up(rows, BLOCK), _up(columns, STEP)) if blocked else _codes(rows, columns)
    scale, outlying = torch.empty(rows), torch.zeros(columns, dtype=torch.uint8) if apart else None
    found = _functions(library).tt_int8_quantize(
        x.data_ptr(), codes.data_ptr(), scale.data_ptr(), None if outlying is None else outlying.data_ptr(),
        rows, columns, _CODE[x.dtype], blocked, limit,
    )  # fmt: skip
    return codes, scale, outlying.nonzero()[:, 0] if found and outlying is not None else None


def set_apart(library: Library, x: Tensor, codes: Tensor, columns: Tensor, *, blocked: bool) -> Tensor:
    """[n, r] of x [n, in]: these columns as they are. Their codes, as ``quantize`` gave them, become 0."""
    rows, inner = x.shape
    values = torch.empty(rows, len(columns), dtype=x.dtype)
    assert not len(columns) or 0 <= int(columns[0]) <= int(columns[-1]) < inner
    _functions(library).tt_int8_apart(
        _address(x, x.dtype, rows, inner), codes.data_ptr(), values.data_ptr(),
        _address(columns, torch.int64, len(columns)), rows, inner, len(columns), _CODE[x.dtype], blocked,
    )  # fmt: skip
    return values


def _codes(rows: int, columns: int) -> Tensor:
    if columns % 2:
        return torch.empty(rows, columns, dtype=torch.int8)
    return buffers.empty(rows, columns // 2, torch.bfloat16, _CPU).view(torch.int8)


def unblocked(codes: Tensor) -> Tensor:
    """Blocked codes as a view [n / 32, 32, in / 64, 64], both sizes rounded up."""
    return codes.view(codes.shape[0] // BLOCK, codes.shape[1] // STEP, BLOCK, STEP).transpose(1, 2)


def dequantize(library: Library, codes: Tensor, scale: Tensor, out: Tensor) -> None:
    """codes · scale / 127 into ``out``; both [out, in]."""
    _functions(library).tt_int8_dequantize(
        _address(codes, torch.int8, *out.shape), _address(scale, torch.float32, len(out)),
        _address(out, out.dtype, *out.shape), *out.shape, _CODE[out.dtype],
    )  # fmt: skip


def rescale(
    library: Library, sums: Tensor, left: Tensor, right: Tensor, apart: Tensor | None, bias: Tensor | None, out: Tensor
) -> None:
    """(sums · left + apart) · right + bias into ``out`` [n, m], whose rows are dense.

    Args:
        sums: [n, m] int32, or whole numbers as float32.
        left, right: [n] and [m] float32.
        apart, bias: [n, m] and [m] float32.
    """
    rows, columns = out.shape
    assert out.stride(1) == 1
    wide = torch.float32
    _functions(library).tt_int8_rescale(
        _address(sums, sums.dtype, rows, columns), _address(left, wide, rows), _address(right, wide, columns),
        _address(apart, wide, rows, columns), _address(bias, wide, columns), out.data_ptr(),
        rows, columns, out.stride(0), sums.dtype == torch.int32, _CODE[out.dtype],
    )  # fmt: skip


def forward(
    library: Library, left: Tensor, left_scale: Tensor, outliers: Tensor, values: Tensor,
    codes: Tensor, scale: Tensor, bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """[n, out] in the dtype of ``values``: LLM.int8()'s product of blocked codes with a weight's, and of the outliers.

    Args:
        left, left_scale: as ``quantize`` gives them.
        outliers, values: which columns were left out, [r] int64, and what is in them, [n, r].
        codes, scale, bias: [out, in] int8, [out] and [out] float32.
    """
    rows, (columns, inner), count = len(left_scale), codes.shape, len(outliers)
    wide = torch.float32
    out = buffers.empty(rows, columns, values.dtype, _CPU)
    call = _Call(rows=rows, inner=inner, outer=columns, outlier_count=count, dtype=_CODE[out.dtype])
    call.left = _address(left, torch.int8, _up(rows, BLOCK), _up(inner, STEP))
    call.left_scale, call.right_scale = _address(left_scale, wide, rows), _address(scale, wide, columns)
    call.codes, call.bias = _address(codes, torch.int8, columns, inner), _address(bias, wide, columns)
    call.outliers, call.result = _address(outliers, torch.int64, count), out.data_ptr()
    _run(library, call, values)
    return out


def backward(library: Library, g: Tensor, codes: Tensor, scale: Tensor, into: Tensor | None) -> Tensor:
    """[n, in]: g [n, out] times codes · scale / 127, in the dtype of ``g``; added to ``into`` if that is given."""
    rows, (outer, inner) = len(g), codes.shape
    assert g.shape[1] == outer
    out = buffers.empty(rows, inner, g.dtype, _CPU) if into is None else into
    assert _address(out, g.dtype, rows, inner)
    for start in range(0, rows, _ROWS):
        part, result = g[start : start + _ROWS], out[start : start + _ROWS]
        call = _Call(rows=len(part), inner=inner, outer=outer, dtype=_CODE[g.dtype], add=into is not None)
        call.codes, call.result = _address(codes, torch.int8, outer, inner), result.data_ptr()
        _run(library, call, part, _address(scale, torch.float32, outer))
    return out


def _run(library: Library, call: _Call, values: Tensor, scale: int | None = None) -> None:
    """Lays ``values`` [n, depth] out as ``tt_int8_product`` reads them, and calls that; both in scratch memory."""
    values = values.contiguous()
    (rows, depth), turned, call.workers = values.shape, not call.left_scale, torch.get_num_threads()
    laid = _up(rows, BLOCK) * _up(depth, 32) * (6 if values.dtype == torch.float32 else 2)
    needed = _scratch(library, rows, call.inner, call.outer, call.outlier_count, call.dtype, turned, call.workers)
    start = buffers.scratch(1, laid + needed, torch.int8, _CPU).data_ptr()
    call.scratch = start + laid
    functions = _functions(library)
    if depth:
        functions.tt_int8_lay(values.data_ptr(), scale, start, rows, depth, call.dtype)
    if turned:
        call.left = start
    else:
        call.values = start
    functions.tt_int8_product(ctypes.byref(call))


@lru_cache(maxsize=512)
def _scratch(
    library: Library, rows: int, inner: int, outer: int, outliers: int, dtype: int, turned: bool, workers: int
) -> int:
    """How many bytes of scratch memory a product needs."""
    call = _Call(rows=rows, inner=inner, outer=outer, outlier_count=outliers, dtype=dtype, workers=workers)
    call.left_scale = None if turned else 1  # where it is does not count, only whether
    needed: int = _functions(library).tt_int8_product(ctypes.byref(call))
    return needed
