"""Which of sorted values is nearest, exactly and fast: one lookup by the upper bits of a float and one comparison.

The rank of a float is how many thresholds lie below it. Thresholds are the midpoints between neighbouring values, in
float32; a float in the middle takes the lower rank, as ``torch.bucketize`` has it. FP4 is the exception: there the
magnitude is rounded and gets its sign back, so a negative float in the middle goes towards zero as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor

from truetune.ops import codebooks
from truetune.ops.codebooks import Kind4

# Between neighbouring magnitudes of FP4, as the CUDA kernels of bitsandbytes spell them: not quite the midpoints.
_FP4_PIVOTS = (0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333)


@dataclass(frozen=True, eq=False)
class Search:
    """The tables for one set of thresholds.

    Attributes:
        thresholds: float32 [values], ascending; the last is infinite.
        base: int32 [65536]: how many thresholds lie below every float that has these upper 16 bits.
        small_base: uint8, the same.
        steps: how many thresholds at most lie among such floats: one, for the maps in use.
    """

    thresholds: Tensor
    base: Tensor
    small_base: Tensor
    steps: int

    def ranks(self, x: Tensor) -> Tensor:
        """Int32 [n] of float32 [n]."""
        upper = (x.view(torch.int32) >> 16).bitwise_and_(0xFFFF)
        ranks = self.base.index_select(0, upper)
        for _ in range(self.steps):
            ranks += x > self.thresholds.index_select(0, ranks)
        return ranks


@cache
def of_kind(kind: Kind4, device: torch.device) -> Search:
    """For a 4-bit codebook: 16 ranks, from its lowest entry to its highest."""
    if kind == "nf4":
        return _search(_midpoints(codebooks.four_bit(kind)), device)
    pivots = torch.tensor(_FP4_PIVOTS, dtype=torch.float32)
    # Negative zero and the negative magnitudes: what equals a pivot lies above the threshold already.
    negative = torch.nextafter(-torch.cat([torch.zeros(1), pivots]), torch.tensor(-torch.inf))
    return _search(torch.cat([negative.flip(0), pivots]), device)


def of_code(code: Tensor, device: torch.device) -> Search:
    """For a map of 8 bits, float32 [256], ascending."""
    assert code.shape == (256,)
    return _of_bytes(code.detach().float().cpu().numpy().tobytes(), device)


@cache
def order(kind: Kind4, device: torch.device) -> Tensor | None:
    """Uint8 [256]: a byte of two ranks -> the byte of their codes; None where ranks are the codes."""
    if kind == "nf4":
        return None
    rising = codebooks.four_bit(kind)[:8].argsort()  # by magnitude
    codes = torch.cat([rising.flip(0) + 8, rising])
    return (codes[:, None] * 16 + codes).flatten().to(device, torch.uint8)


@lru_cache(maxsize=16)
def _of_bytes(code: bytes, device: torch.device) -> Search:
    return _search(_midpoints(torch.frombuffer(bytearray(code), dtype=torch.float32)), device)


def _midpoints(values: Tensor) -> Tensor:
    return (values[:-1] + values[1:]) / 2


def _search(thresholds: Tensor, device: torch.device) -> Search:
    lowest = torch.arange(1 << 16) << 16
    ends = torch.stack([lowest, lowest | 0xFFFF]).to(torch.int32).view(torch.float32)  # turned round by a sign
    below = torch.bucketize(ends, thresholds, out_int32=True)
    base = below.amin(0)
    steps = int((below.amax(0) - base)[ends.isfinite().all(0)].max())
    padded = torch.cat([thresholds, torch.tensor([torch.inf])])
    return Search(padded.to(device), base.to(device), base.to(device, torch.uint8), steps)
