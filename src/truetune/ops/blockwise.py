"""Block-wise quantisation to 4 and 8 bits, to the bit as bitsandbytes defines it.

A tensor is cut into blocks of its values in memory order (row-major). A block keeps the largest of its magnitudes,
absmax, in float32; each value is stored as the code whose entry of a codebook is nearest to value / absmax. In 4 bits
this is the NF4 or FP4 of QLoRA (Dettmers et al. 2023, arXiv:2305.14314), where absmax may be quantised in turn ("double
quantisation"); in 8 bits, with a map of 256 values, it is how optimizer states are kept (Dettmers et al. 2022,
arXiv:2110.02861).

Which entry is nearest is decided exactly (``ops/nearest.py``), from value · (1 / absmax) in float32: codes are the same
in every tier and on every device.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from truetune.errors import QuantizationError
from truetune.ops import codebooks, dispatch, nearest, pieces
from truetune.ops.codebooks import Kind4
from truetune.ops.native import blockwise as kernels
from truetune.ops.nearest import Search

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED = 256  # blocks per block of double quantisation
_LEAST = 1e-38  # blocks below it are scaled as if they had it, so that 1 / absmax is finite


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
    _check_source(x)
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
    _check_finite(absmax, x)
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


def quantize_8bit(x: Tensor, code: Tensor, *, blocksize: int = 256) -> tuple[Tensor, Tensor]:
    """Quantise to the nearest of 256 values.

    Args:
        x: any shape, strides and floating dtype; float64 is rounded to float32 first.
        code: float32 [256], ascending. Where it has 0, a zero stays one.
        blocksize: values per absmax.
    Returns:
        The codes, uint8 of the shape of ``x``, and absmax, float32 [blocks].
    Raises:
        QuantizationError: values that are not finite (it says how many), not floating, or on the meta device.
    """
    assert code.shape == (256,)
    _check_source(x)
    codes = torch.empty(x.numel(), dtype=torch.uint8, device=x.device)
    absmax = torch.empty(-(-x.numel() // blocksize), dtype=torch.float32, device=x.device)
    search = nearest.of_code(code, x.device)
    for start, part in pieces.of(x, blocksize):
        into, scales = codes[start:], absmax[start // blocksize :]
        if library := dispatch.native(part):
            kernels.quantize_8bit(
                library, part, into, scales, base=search.small_base, thresholds=search.thresholds,
                steps=search.steps, blocksize=blocksize,
            )  # fmt: skip
        else:
            ranks = _ranks(part, scales, search, blocksize)
            into[: len(part)].copy_(ranks[: len(part)])
    _check_finite(absmax, x)
    return codes.view(x.shape), absmax


def dequantize_8bit(
    codes: Tensor,
    absmax: Tensor,
    code: Tensor,
    *,
    blocksize: int = 256,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
) -> Tensor:
    """Computes code[codes] · absmax in float32, rounded once.

    Args:
        codes: uint8, any shape, contiguous.
        absmax: float32 [blocks].
        code: float32 [256].
        out: where to put the result: contiguous, of the shape of ``codes`` and of ``dtype``.
    Returns:
        [*codes.shape] of ``dtype``.
    """
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device) if out is None else out
    assert (out.shape, out.dtype) == (codes.shape, dtype)
    assert out.is_contiguous()
    flat, into = codes.view(-1), out.view(-1)
    if library := dispatch.native(into, code):
        kernels.dequantize_8bit(library, flat, absmax, code, into, blocksize=blocksize)
        return out
    step = pieces.length(blocksize)
    for start in range(0, len(flat), step):
        values = code.index_select(0, flat[start : start + step].int())
        into[start : start + step].copy_(_scaled_(values, absmax[start // blocksize :], blocksize))
    return out


def _count(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _check_source(x: Tensor) -> None:
    if x.is_meta:
        raise QuantizationError(
            "on the meta device, which holds no values", ("way out", "load the values first, then quantise them")
        )
    if not x.is_floating_point():
        name = str(x.dtype).removeprefix("torch.")
        raise QuantizationError(f"values of type {name}", ("expected", "a floating type"))


def _check_finite(absmax: Tensor, x: Tensor) -> None:
    if bool(absmax.isfinite().all()):
        return
    bad = sum(int((~part.isfinite()).sum()) for _, part in pieces.of(x, 1))
    raise QuantizationError(
        f"{bad:,} of {x.numel():,} values are not finite in float32",
        ("way out", "weights like these come from a diverged run or a damaged file: take an earlier checkpoint"),
    )


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


def _ranks(values: Tensor, absmax: Tensor, search: Search, blocksize: int) -> Tensor:
    """Int32 [n, up to a whole block]: how many thresholds lie below each of ``values`` [n], scaled. Fills absmax."""
    values = torch.nn.functional.pad(values.float(), (0, -len(values) % blocksize)).view(-1, blocksize)
    largest = values.abs().amax(1)
    absmax[: len(largest)].copy_(largest)
    return search.ranks((values * (1.0 / largest.clamp_min(_LEAST))[:, None]).view(-1))


def _quantize_4bit(
    values: Tensor, codes: Tensor, absmax: Tensor, search: Search, order: Tensor | None, blocksize: int
) -> None:
    pairs = _ranks(values, absmax, search, blocksize).view(-1, 2)[: (len(values) + 1) // 2]
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
        _scaled_(values, scales[piece // size - first :], size)
        if not direct:
            into.copy_(values[low - piece : high - piece])


def _scaled_(values: Tensor, absmax: Tensor, blocksize: int) -> Tensor:
    """Multiply the blocks of ``values`` [n], the last of which may be short, by absmax [blocks] in place."""
    whole = len(values) // blocksize
    values[: whole * blocksize].view(-1, blocksize).mul_(absmax[:whole, None])
    if len(values) % blocksize:
        values[whole * blocksize :].mul_(absmax[whole])
    return values
