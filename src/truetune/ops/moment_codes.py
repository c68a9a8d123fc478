"""Moments of an optimizer as codes of the dynamic maps: those of ``ops.blockwise``, found with one lookup per value."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from truetune.ops import codebooks

_LEAST = 1e-38  # as in ops.blockwise: blocks below it are scaled as if they had it, so that 1 / absmax is finite


@cache
def moment_map(signed: bool, device: torch.device) -> Tensor:
    """[256] float32: what codes stand for, in units of absmax. Not to be written to."""
    return codebooks.dynamic(signed=signed).to(device)


@cache
def nearest_entries(signed: bool, device: torch.device) -> Tensor:
    """[65536] int32: an entry for each upper half of a float's bits. Not to be written to.

    No two thresholds (the middles between neighbouring values of the map) lie among the floats of an entry. It is
    (code << 16) + k, where k is such that adding the lower half of a positive float carries into the code exactly
    beyond the threshold; of a negative float, the lower half is subtracted and borrows. A value in the middle takes the
    lower code.
    """
    values = codebooks.dynamic(signed=signed)
    thresholds = (values[:-1] + values[1:]) / 2
    low = torch.arange(1 << 16, dtype=torch.int64) << 16
    first, last = (_below(bits, thresholds) for bits in (low, low | 0xFFFF))
    assert int((last - first).abs().max()) <= 1
    negative = low >= 1 << 31
    threshold = thresholds.view(torch.int32)[torch.maximum(first, last).clamp_min(1) - 1].long() & 0xFFFF
    within = torch.where(negative, threshold - 1, 0xFFFF - threshold)
    none = torch.where(negative, 0xFFFF, 0)
    return ((first << 16) + torch.where(first == last, none, within)).to(device, torch.int32)


def _below(bits: Tensor, thresholds: Tensor) -> Tensor:
    """How many thresholds lie below the floats with these bits; NaN counts as the infinity of its sign."""
    values = bits.to(torch.int32).view(torch.float32)
    infinite = torch.copysign(torch.tensor(torch.inf), values)
    return torch.bucketize(torch.where(values.isnan(), infinite, values), thresholds)


def encode_(codes: Tensor, absmax: Tensor, values: Tensor, *, signed: bool, blocksize: int) -> None:
    """Write ``values`` as codes and scales.

    Args:
        codes: uint8 [n].
        absmax: float32 [blocks].
        values: float32 [n], finite; nothing below 0 if not ``signed``.
    """
    n = len(values)
    blocks = torch.nn.functional.pad(values, (0, -n % blocksize)) if n % blocksize else values
    blocks = blocks.view(-1, blocksize)
    torch.amax(blocks.abs(), 1, out=absmax)
    bits = (blocks * (1.0 / absmax.clamp_min(_LEAST))[:, None]).view(-1)[:n].view(torch.int32)
    low = bits & 0xFFFF
    if signed:
        sign = bits >> 31
        low.bitwise_xor_(sign).sub_(sign)
    entries = nearest_entries(signed, values.device).index_select(0, (bits >> 16).bitwise_and_(0xFFFF))
    codes.copy_(entries.add_(low).bitwise_right_shift_(16))


def decoded(codes: Tensor, absmax: Tensor, *, signed: bool, blocksize: int) -> Tensor:
    """Float32 [n], given codes [n] and scales [blocks]."""
    values = moment_map(signed, codes.device).index_select(0, codes.int())
    whole, left = divmod(len(codes), blocksize)
    values[: whole * blocksize].view(-1, blocksize).mul_(absmax[:whole, None])
    if left:
        values[whole * blocksize :].mul_(absmax[whole:])
    return values
