"""The C kernels for quantised blocks, on tensors: on the CPU. C trusts sizes and types, so they are asserted here."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from truetune.ops.native.library import Library

_CODE = {torch.float32: 0, torch.bfloat16: 1}  # TT_FLOAT32 and TT_BFLOAT16 of simd.h
_NESTED = 256

_P, _I64, _I32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
_ARGUMENTS = {
    "tt_quantize_4bit": (_P, _P, _P, _P, _P, _I64, _I64, _I32),
    "tt_dequantize_4bit": (_P, _P, _P, _P, _P, _P, _P, _P, _I64, _I64, _I64, _I32),
    "tt_quantize_8bit": (_P, _P, _P, _P, _P, _I32, _I64, _I64, _I32),
    "tt_dequantize_8bit": (_P, _P, _P, _P, _I64, _I64, _I32),
}


@cache
def _functions(library: Library) -> ctypes.CDLL:
    """The library's functions with their argument types told, once."""
    for name, types in _ARGUMENTS.items():
        function = getattr(library.functions, name)
        function.argtypes = types
        function.restype = None
    return library.functions


def _address(tensor: Tensor | None, dtype: torch.dtype = torch.float32, least: int = 0) -> int | None:
    """Where a dense tensor on the CPU starts; None for none."""
    if tensor is None:
        return None
    assert tensor.dtype == dtype
    assert tensor.is_cpu
    assert tensor.is_contiguous()
    assert tensor.numel() >= least
    return tensor.data_ptr()


def _blocks(n: int, blocksize: int) -> int:
    assert blocksize > 0
    return -(-n // blocksize)


def quantize_4bit(
    library: Library,
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    *,
    thresholds: Tensor,
    order: Tensor | None,
    blocksize: int,
) -> None:
    """Codes uint8 [(n + 1) / 2] and absmax [blocks] of x [n]; absmax is NaN where a block is not finite."""
    n = x.numel()
    assert blocksize % 32 == 0
    _functions(library).tt_quantize_4bit(
        _address(x, x.dtype), _address(codes, torch.uint8, (n + 1) // 2), _address(absmax, least=_blocks(n, blocksize)),
        _address(thresholds, least=15), _address(order, torch.uint8, 256), n, blocksize, _CODE[x.dtype],
    )  # fmt: skip


def dequantize_4bit(
    library: Library,
    codes: Tensor,
    out: Tensor,
    *,
    values: Tensor,
    start: int,
    blocksize: int,
    absmax: Tensor | None = None,
    nested: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> None:
    """Values start, start + 1, ... into ``out``, as many as it holds.

    Args:
        values: [16] by code.
        absmax: [blocks], or ``nested``: codes uint8 [blocks], absmax [blocks / 256], offset and map [256] of the same.
    """
    stop = start + out.numel()
    blocks = _blocks(stop, blocksize)
    assert start >= 0
    assert blocksize % 32 == 0
    assert (absmax is None) != (nested is None)
    scale_codes, scale_absmax, offset, scale_map = nested or (None,) * 4
    _functions(library).tt_dequantize_4bit(
        _address(codes, torch.uint8, (stop + 1) // 2), _address(absmax, least=blocks),
        _address(scale_codes, torch.uint8, blocks), _address(scale_absmax, least=_blocks(blocks, _NESTED)),
        _address(offset, least=1), _address(scale_map, least=256), _address(values, least=16),
        _address(out, out.dtype), start, stop, blocksize, _CODE[out.dtype],
    )  # fmt: skip


def quantize_8bit(
    library: Library,
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    *,
    base: Tensor,
    thresholds: Tensor,
    steps: int,
    blocksize: int,
) -> None:
    """Codes uint8 [n] and absmax [blocks] of x [n]; absmax is NaN where a block is not finite.

    Args:
        base, thresholds, steps: ``tt_search`` of blockwise_8bit.h.
    """
    n = x.numel()
    _functions(library).tt_quantize_8bit(
        _address(x, x.dtype), _address(codes, torch.uint8, n), _address(absmax, least=_blocks(n, blocksize)),
        _address(base, torch.uint8, 1 << 16), _address(thresholds, least=256), steps, n, blocksize, _CODE[x.dtype],
    )  # fmt: skip


def dequantize_8bit(
    library: Library, codes: Tensor, absmax: Tensor, values: Tensor, out: Tensor, *, blocksize: int
) -> None:
    """Codes uint8 [n] with absmax [blocks] into ``out`` [n]; ``values`` [256] by code."""
    n = out.numel()
    _functions(library).tt_dequantize_8bit(
        _address(codes, torch.uint8, n), _address(absmax, least=_blocks(n, blocksize)), _address(values, least=256),
        _address(out, out.dtype), n, blocksize, _CODE[out.dtype],
    )  # fmt: skip
