"""Block-wise quantisation to 8 bits, to the bit as bitsandbytes defines it, and what its 4 bits have in common with it.

A tensor is cut into blocks of its values in memory order (row-major). A block keeps the largest of its magnitudes,
absmax, in float32; each value is stored as the code whose entry of a codebook is nearest to value / absmax. With a map
of 256 values this is how optimizer states are kept (Dettmers et al. 2022, arXiv:2110.02861).

Which entry is nearest is decided exactly (``ops/nearest.py``), from value · (1 / absmax) in float32: codes are the same
in every tier and on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from truetune.errors import QuantizationError
from truetune.ops import dispatch, nearest, pieces
from truetune.ops.native import blockwise as kernels
from truetune.ops.nearest import Search

LEAST = 1e-38  # blocks below it are scaled as if they had it, so that 1 / absmax is finite


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
    check_source(x)
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
            ranks = scaled_ranks(part, scales, search, blocksize)
            into[: len(part)].copy_(ranks[: len(part)])
    check_finite(absmax, x)
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
        into[start : start + step].copy_(rescale_(values, absmax[start // blocksize :], blocksize))
    return out


def check_source(x: Tensor) -> None:
    """Raises QuantizationError for a tensor without values, or without floating ones."""
    if x.is_meta:
        raise QuantizationError(
            "on the meta device, which holds no values", ("way out", "load the values first, then quantise them")
        )
    if not x.is_floating_point():
        name = str(x.dtype).removeprefix("torch.")
        raise QuantizationError(f"values of type {name}", ("expected", "a floating type"))


def check_finite(absmax: Tensor, x: Tensor) -> None:
    """Raises QuantizationError where ``x`` holds values that are not finite, as its ``absmax`` [blocks] then shows."""
    if bool(absmax.isfinite().all()):
        return
    bad = sum(int((~part.isfinite()).sum()) for _, part in pieces.of(x, 1))
    raise QuantizationError(
        f"{bad:,} of {x.numel():,} values are not finite in float32",
        ("way out", "weights like these come from a diverged run or a damaged file: take an earlier checkpoint"),
    )


def scaled_ranks(values: Tensor, absmax: Tensor, search: Search, blocksize: int) -> Tensor:
    """Int32 [n, up to a whole block]: how many thresholds lie below each of ``values`` [n], scaled. Fills absmax."""
    values = torch.nn.functional.pad(values.float(), (0, -len(values) % blocksize)).view(-1, blocksize)
    largest = values.abs().amax(1)
    absmax[: len(largest)].copy_(largest)
    return search.ranks((values * (1.0 / largest.clamp_min(LEAST))[:, None]).view(-1))


def rescale_(values: Tensor, absmax: Tensor, blocksize: int) -> Tensor:
    """Multiply the blocks of ``values`` [n], the last of which may be short, by absmax [blocks] in place."""
    whole = len(values) // blocksize
    values[: whole * blocksize].view(-1, blocksize).mul_(absmax[:whole, None])
    if len(values) % blocksize:
        values[whole * blocksize :].mul_(absmax[whole])
    return values
