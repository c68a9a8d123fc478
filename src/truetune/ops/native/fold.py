"""W + s B A in C, on plain memory: a merge that streams through buffers has no tensors, and imports no torch."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

from truetune.ops.native.library import Library

CODE = {"float32": 0, "bfloat16": 1}
"""What W may be stored as: TT_FLOAT32 and TT_BFLOAT16 of simd.h."""

_P, _I64, _I32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


_COLUMNS = 64  # TT_FOLD_COLUMNS of fold.h
_LINE = 64  # bytes of a line of the cache, which a vector should not cross


@dataclass(frozen=True, slots=True)
class Factors:
    """s B A: B [rows, rank] in float32 and dense, and A [rank, columns] as ``factors`` lays it out.

    Attributes:
        a, b: where they lie; ``kept`` is what has to stay alive for it.
    """

    a: int
    b: int
    rank: int
    columns: int
    scale: float
    kept: tuple[object, ...] = ()


@cache
def _functions(library: Library) -> ctypes.CDLL:
    functions = library.functions
    functions.tt_fold.argtypes = (*[_P] * 3, *[_I64] * 3, ctypes.c_float, _I32)
    functions.tt_fold_blocks.argtypes = (_P, _P, _I64, _I64, _I32)
    functions.tt_wide.argtypes = (_P, _P, _I64, _I32)
    functions.tt_fold.restype, functions.tt_fold_blocks.restype, functions.tt_wide.restype = _I32, None, None
    return functions


def fold(library: Library, weight: int, rows: int, factors: Factors, *, dtype: str, first: int = 0) -> bool:
    """Add s B A to rows of W, in place; the sum is formed in float32 and rounded once, to the nearest even.

    Args:
        weight: where the first of these rows starts; they are dense.
        rows: how many there are.
        dtype: of W, one of ``CODE``.
        first: which row of the whole W, and of B, the first one is.
    Returns:
        Whether every sum is finite.
    """
    b = factors.b + 4 * first * factors.rank
    sizes = (rows, factors.columns, factors.rank)
    return bool(_functions(library).tt_fold(weight, factors.a, b, *sizes, factors.scale, CODE[dtype]))


def factors(
    library: Library, a: int, b: int, *, rank: int, columns: int, scale: float, dtype: str, kept: object = None
) -> Factors:
    """s B A, with A laid out for ``fold``.

    Args:
        a: where A starts, dense and stored as ``dtype``; it is copied.
        b: where B starts, dense and in float32; it is not copied.
        kept: what has to stay alive for ``b``.
    """
    blocks = -(-columns // _COLUMNS)
    memory = bytearray(4 * blocks * _COLUMNS * rank + _LINE)
    start = -(-address(memory) // _LINE) * _LINE
    _functions(library).tt_fold_blocks(start, a, rank, columns, CODE[dtype])
    return Factors(start, b, rank, columns, scale, kept=(memory, kept))


def wide(library: Library, raw: bytearray, *, dtype: str) -> bytearray:
    """Numbers in float32, from memory that holds them as ``dtype``; the same memory where they are wide already."""
    if dtype == "float32":
        return raw
    count = len(raw) // 2
    found = bytearray(4 * count)
    _functions(library).tt_wide(address(found), address(raw), count, CODE[dtype])
    return found


def address(memory: bytearray | memoryview) -> int:
    """Where writable memory starts; it must be kept alive, and not empty."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
