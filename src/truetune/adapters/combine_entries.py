"""Entry by entry: which of several tensors' entries count, and what becomes of them.

TIES: Yadav et al. 2023, arXiv:2306.01708, section 4. DARE: Yu et al. 2023, arXiv:2311.03099, section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ w τ_i: task arithmetic (Ilharco et al. 2022, arXiv:2212.04089)."""
    return torch.stack([tensor * weight for tensor, weight in zip(tensors, weights, strict=True)]).sum(0)


def largest(tensor: Tensor, *, density: float) -> Tensor:
    """TIES, trim: the share ``density`` of largest magnitude, rounded down to a count; the other entries are zero."""
    kept = tensor.abs().flatten().topk(int(density * tensor.numel())).indices
    mask = torch.zeros(tensor.numel(), dtype=torch.bool, device=tensor.device).index_fill(0, kept, True)
    return tensor * mask.view_as(tensor)


def dropped_at_random(tensor: Tensor, *, density: float, draws: torch.Generator | None) -> Tensor:
    """DARE: each entry is kept with probability ``density`` and divided by it, so that the expectation stays.

    Args:
        draws: a generator on the CPU.
    """
    kept = torch.rand(tensor.shape, generator=draws).to(tensor.device) < density
    return tensor * kept / density


def in_agreement(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """TIES, elect and merge: the mean of w τ_i over those whose sign is the elected one, that of Σ τ_i.

    As PEFT does it: the election counts tensors without their weights, and a tie of signs elects plus.
    """
    stacked = torch.stack(list(tensors))
    elected = torch.where(stacked.sum(0) >= 0, 1.0, -1.0)
    agrees = stacked.sign() == elected
    total = weighted_sum([tensor * mask for tensor, mask in zip(tensors, agrees, strict=True)], weights)
    return total / agrees.sum(0).clamp(min=1)
