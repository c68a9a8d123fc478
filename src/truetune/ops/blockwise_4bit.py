"""Block-wise quantisation to 4 bits, to the bit as bitsandbytes defines it.

This is the NF4 or FP4 of QLoRA (Dettmers et al. 2023, arXiv:2305.14314), in blocks as ``ops/blockwise_8bit`` has them;
absmax may be quantised in turn, to 8 bits ("double quantisation").
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from truetune.ops import codebooks, dispatch, nearest, pieces
from truetune.ops.blockwise_8bit import (
    check_finite,
    check_source,
    dequantize_8bit,
    quantize_8bit,
    rescale_,
    scaled_ranks,
)
from truetune.ops.codebooks import Kind4
from truetune.ops.native import blockwise as kernels
from truetune.ops.nearest import Search

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED = 256  # blocks per block of double quantisation


@dataclass(frozen=True, eq=False)
class Nested:
    """Double-quantised absmax: ``map[codes] · absmax + offset`` with the signed dynamic map.

    Attributes:
        codes: uint8 [blocks].
        absmax: float32 [blocks / 256, rounded up].
        offset: float32 [], the mean.
    """

    codes: Tensor
    absmax: Tensor
    offset: Tensor


@dataclass(frozen=True, eq=False)
class Packed4:
    """A tensor in 4 bits.

    Attributes:
        codes: uint8 [half of the values, rounded up]; the first of two values is the upper half of a byte.
        absmax: float32 [blocks], or None if ``nested`` holds it.
        kind: the codebook.
        blocksize: values per absmax.
        shape, dtype: of the tensor that was quantised.
    """

    codes: Tensor
    absmax: Tensor | None
    nested: Nested | None
    kind: Kind4
    blocksize: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """What it takes to store."""
        nested = (self.nested.codes, self.nested.absmax, self.nested.offset) if self.nested else ()
        return sum(t.nbytes for t in (self.codes, self.absmax, *nested) if t is not None)

    def scales(self) -> Tensor:
        """Absmax, float32 [blocks]; computed where it is quantised."""
        return _scales(self, 0, -(-_count(self.shape) // self.blocksize))


def quantize_4bit(x: Tensor, kind: Kind4 = "nf4", *, blocksize: int = 64, double: bool = False) -> Packed4:
    """Quantise to NF4 or FP4.

    Args:
        x: any shape, strides and floating dtype; float64 is rounded to float32 first.
        kind: the codebook.
        blocksize: values per absmax, one of ``BLOCKSIZES``.
        double: quantise absmax too.
    Raises:
        QuantizationError: values that are not finite (it says how many), not floating, or on the meta device.
        ValueError: another kind or blocksize.
    """
    if kind not in ("nf4", "fp4"):
        raise ValueError(f"kind {kind!r}: expected nf4 or fp4")
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize {blocksize}: expected one of {', '.join(map(str, BLOCKSIZES))}")
    check_source(x)
    codes = torch.empty((x.numel() + 1) // 2, dtype=torch.uint8, device=x.device)
    absmax = torch.empty(-(-x.numel() // blocksize), dtype=torch.float32, device=x.device)
    search, order = nearest.of_kind(kind, x.device), nearest.order(kind, x.device)
    for start, part in pieces.of(x, blocksize):
        into, scales = codes[start // 2 :], absmax[start // blocksize :]
        if library := dispatch.native(part):
            kernels.quantize_4bit(
                library, part, into, scales, thresholds=search.thresholds, order=order, blocksize=blocksize
            )
        else:
            _quantize_4bit(part, into, scales, search, order, blocksize)
    check_finite(absmax, x)
    nested = _nested(absmax) if double else None
    return Packed4(codes, None if double else absmax, nested, kind, blocksize, tuple(x.shape), x.dtype)


def dequantize_4bit(
    packed: Packed4, *, dtype: torch.dtype | None = None, out: Tensor | None = None, rows: slice | None = None
) -> Tensor:
    """Computes codebook[code] · absmax in float32, rounded once to the result's dtype.

    Args:
        dtype: of the result; default that of ``out``, or else the one that was quantised.
        out: where to put it: contiguous, of its shape.
        rows: a contiguous range of the first dimension, where only that is wanted.
    Returns:
        [*packed.shape], or [rows, *packed.shape[1:]].
    """
    start, shape = _range(packed.shape, rows)
    if out is None:
        out = torch.empty(shape, dtype=dtype or packed.dtype, device=packed.codes.device)
    assert out.shape == shape
    assert dtype in (None, out.dtype)
    assert out.is_contiguous()
    flat, nested = out.view(-1), packed.nested
    parts = (nested.codes, nested.absmax, nested.offset, codebooks.dynamic(signed=True)) if nested else None
    if library := dispatch.native(flat):
        kernels.dequantize_4bit(
            library, packed.codes, flat, values=codebooks.four_bit(packed.kind), start=start,
            blocksize=packed.blocksize, absmax=packed.absmax, nested=parts,
        )  # fmt: skip
    else:
        _dequantize_4bit(packed, start, flat)
    return out


def _count(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _range(shape: tuple[int, ...], rows: slice | None) -> tuple[int, tuple[int, ...]]:
    """The first value that is wanted, and the shape of all that are."""
    if rows is None:
        return 0, shape
    first, stop, step = rows.indices(shape[0])
    assert step == 1
    return first * _count(shape[1:]), (max(stop - first, 0), *shape[1:])


def _nested(absmax: Tensor) -> Nested:
    # Summed in float64, lest the number of threads shows in the last bit.
    offset = absmax.mean(dtype=torch.float64).float() if len(absmax) else absmax.new_zeros(())
    codes, scales = quantize_8bit(absmax - offset, codebooks.dynamic(signed=True), blocksize=NESTED)
    return Nested(codes, scales, offset)


def _scales(packed: Packed4, first: int, stop: int) -> Tensor:
    """Absmax of blocks first, ..., stop - 1."""
    nested = packed.nested
    if nested is None:
        assert packed.absmax is not None
        return packed.absmax[first:stop]
    start = first // NESTED * NESTED
    code = codebooks.dynamic(signed=True).to(nested.codes.device)
    scales = dequantize_8bit(nested.codes[start:stop], nested.absmax[start // NESTED :], code, blocksize=NESTED)
    return scales[first - start :].add_(nested.offset)


def _quantize_4bit(
    values: Tensor, codes: Tensor, absmax: Tensor, search: Search, order: Tensor | None, blocksize: int
) -> None:
    pairs = scaled_ranks(values, absmax, search, blocksize).view(-1, 2)[: (len(values) + 1) // 2]
    packed = pairs[:, 0] * 16 + pairs[:, 1]
    codes[: len(packed)].copy_(packed if order is None else order.index_select(0, packed))


@cache
def _pairs(kind: Kind4, device: torch.device) -> Tensor:
    """[256] by byte: its two values, side by side in the bits of an int64. One lookup then gives both."""
    values = codebooks.four_bit(kind)
    return torch.stack(torch.meshgrid(values, values, indexing="ij"), -1).view(torch.int64).flatten().to(device)


def _dequantize_4bit(packed: Packed4, start: int, out: Tensor) -> None:
    size, stop, table = packed.blocksize, start + len(out), _pairs(packed.kind, packed.codes.device)
    first, step = start // size, pieces.length(size)
    scales = _scales(packed, first, -(-stop // size))
    room = torch.empty(min(step, 2 * len(packed.codes)), dtype=torch.float32, device=out.device)
    for piece in range(first * size, stop, step):
        codes = packed.codes[piece // 2 : min(piece + step, -(-stop // size) * size) // 2]
        low, high = max(start, piece), min(stop, piece + step)
        into = out[low - start : high - start]
        # Pairs are written where they shall be, if the result is made of whole ones.
        direct = out.dtype == torch.float32 and len(into) == 2 * len(codes) and into.storage_offset() % 2 == 0
        values = into if direct else room[: 2 * len(codes)]
        torch.index_select(table, 0, codes.int(), out=values.view(torch.int64))
        rescale_(values, scales[piece // size - first :], size)
        if not direct:
            into.copy_(values[low - piece : high - piece])
