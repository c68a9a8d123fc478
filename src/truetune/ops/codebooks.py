"""The values that quantised codes stand for, as bitsandbytes defines them: 16 of 4 bits, 256 of 8.

NF4 is from Dettmers et al. 2023 (arXiv:2305.14314, appendix E), the dynamic map from Dettmers et al. 2022
(arXiv:2110.02861, section 1.3). All are scaled so that the largest magnitude is 1.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
from torch import Tensor

Kind4 = Literal["nf4", "fp4"]

_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# One sign bit, two of exponent, one of mantissa; in the order of the bit patterns, so not sorted.
_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
_EXPONENTS = 7  # decades of the dynamic map


@cache
def four_bit(kind: Kind4) -> Tensor:
    """[16] float32 on the CPU, by code. Not to be written to."""
    if kind == "nf4":
        return torch.tensor(_NF4, dtype=torch.float32)
    magnitudes = torch.tensor(_FP4, dtype=torch.float32) / 12.0
    return torch.cat([magnitudes, -magnitudes])


@cache
def dynamic(*, signed: bool = True) -> Tensor:
    """[256] float32, sorted: linear within a decade, with the more steps the larger the decade. Not to be written to.

    Signed, 127 is zero and the smallest step 5.5e-7; unsigned, 0 is zero and the next 3.25e-7.
    """
    values = [0.0, 1.0]
    for i in range(_EXPONENTS):
        edges = torch.linspace(0.1, 1.0, 2 ** (i + (0 if signed else 1)) + 1, dtype=torch.float32)
        decade = 10 ** (i + 1 - _EXPONENTS)
        middles = (decade * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += middles + ([-value for value in middles] if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float32)


@cache
def linear(*, signed: bool = True) -> Tensor:
    """[256] float32, sorted and evenly spaced over [-1, 1] or [0, 1]. Not to be written to.

    Signed, one value less than there are codes makes room for an exact zero, next to the middle one of rounding (4e-9).
    """
    if not signed:
        return torch.linspace(0.0, 1.0, 256)
    values = torch.linspace(-1.0, 1.0, 255)
    return torch.cat([values[:127], torch.zeros(1), values[127:]])


def quantile(x: Tensor) -> Tensor:
    """[256] float32, sorted: codes that the values of ``x`` use equally often, and zero.

    Quantiles are estimated as in SRAM-Quantiles (arXiv:2110.02861, appendix): each block of 4,096 values is sorted and
    255 of its order statistics are taken, which are averaged over the full blocks; a tensor shorter than that is one.

    Args:
        x: any shape and floating dtype, at least one value.
    """
    quantiles = torch.cat([estimate_quantiles(x, 255), torch.zeros(1, device=x.device)]).sort().values
    return quantiles / quantiles.abs().max().clamp_min(torch.finfo(torch.float32).tiny)


_SAMPLE = 4096


def estimate_quantiles(x: Tensor, count: int = 256, *, offset: float = 1 / 512) -> Tensor:
    """[count] float32: quantiles of ``x`` from ``offset`` to ``1 - offset``, evenly apart in probability."""
    flat = x.detach().reshape(-1).float()
    if len(flat) >= _SAMPLE:
        flat = flat[: len(flat) // _SAMPLE * _SAMPLE]
    blocks = flat.view(-1, min(_SAMPLE, len(flat))).sort(dim=1).values
    at = torch.linspace(offset, 1 - offset, count, dtype=torch.float64, device=x.device) * (blocks.shape[1] - 1)
    return blocks[:, at.round().long()].mean(dim=0)
