"""An optimizer's moments as codes of the dynamic maps: those of ``ops.blockwise_8bit``, by one lookup per value."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from truetune.ops import codebooks
from truetune.ops.blockwise_8bit import LEAST


@cache
def moment_map(signed: bool, device: torch.device) -> Tensor:
    """[256] float32: what codes stand for, in units of absmax. Not to be written to."""
    return codebooks.dynamic(signed=signed).to(device)


@cache
def nearest_entries(signed: bool, device: torch.device) -> Tensor:
    """[65536] int32: an entry for each upper half of a float's bits. Not to be written to.

    Let y be a float's bits, all of them flipped where it is negative: within a sign, y grows with the float. The code
    nearest to it is (entry + y) >> 16. For no two thresholds (the middles between neighbouring values of the map) lie
    among the floats of one entry, and it is such that adding y carries into the code exactly beyond the threshold. A
    value in the middle takes the lower code.
    """
    values = codebooks.dynamic(signed=signed)
    thresholds = (values[:-1] + values[1:]) / 2
    upper = torch.arange(1 << 16)
    flipped = torch.where(upper >= 1 << 15, 0xFFFF_FFFF, 0)
    start = (upper << 16) ^ (flipped & 0xFFFF_0000)  # the least y of an entry
    lowest, highest = (_below((start | end) ^ flipped, thresholds) for end in (0, 0xFFFF))
    assert int((highest - lowest).min()) == 0
    assert int((highest - lowest).max()) == 1
    bits = thresholds.view(torch.int32)[lowest.clamp_max(254)]
    beyond = 0xFFFF - ((bits ^ (bits >> 31)) & 0xFFFF)
    entries = (lowest << 16) - start + torch.where(lowest == highest, 0, beyond)
    return entries.to(device, torch.int32)


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
    torch.amax(blocks.abs() if signed else blocks, 1, out=absmax)
    bits = (blocks * (1.0 / absmax.clamp_min(LEAST))[:, None]).view(-1)[:n].view(torch.int32)
    upper = bits >> 16
    if signed:
        upper.bitwise_and_(0xFFFF)
        bits = (bits >> 31).bitwise_xor_(bits)
    codes.copy_(nearest_entries(signed, values.device).index_select(0, upper).add_(bits).bitwise_right_shift_(16))


def decoded(codes: Tensor, absmax: Tensor, *, signed: bool, blocksize: int) -> Tensor:
    """Float32 [n], given codes [n] and scales [blocks]."""
    values = moment_map(signed, codes.device).index_select(0, codes.int())
    whole, left = divmod(len(codes), blocksize)
    values[: whole * blocksize].view(-1, blocksize).mul_(absmax[:whole, None])
    if left:
        values[whole * blocksize :].mul_(absmax[whole:])
    return values
