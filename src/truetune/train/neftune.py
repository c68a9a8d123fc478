"""Noise on the embeddings while training.  NEFTune: Jain et al. 2023, arXiv:2310.05914, algorithm 1.

    x ← x + (alpha / √(L d)) u,    u uniform in [-1, 1]

L is the example's own length, whatever shares its row or pads it; d is the width of the embeddings. Virtual tokens are
trained themselves: they count for nothing and get no noise. The noise derives from the tokens' counters, so it depends
neither on how a batch is cut or packed, nor on where a run was resumed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from truetune.data.pack import Batch
from truetune.ops.dropout import lanes
from truetune.ops.rng import derive_seed
from truetune.train.step import Loss

_SITE = derive_seed(0, "site", "neftune")


@dataclass(frozen=True)
class NoisyLoss:
    """A loss with noise on what the embedding table puts out, for as long as it is computed.

    Attributes:
        loss_of: the loss without.
        table: the model's embedding table, adapted or not.
        alpha: strength of the noise.
    """

    loss_of: Loss
    table: nn.Module
    alpha: float

    def __call__(self, batch: Batch) -> Tensor:
        """As ``loss_of``."""

        def add(module: nn.Module, args: Any, rows: Tensor) -> Tensor:
            """[B, T or more, d], of which what goes beyond the batch only fills a row up."""
            extra = noise(batch, rows.shape[-1], self.alpha, device=rows.device)
            extra = F.pad(extra, (0, 0, 0, rows.shape[1] - extra.shape[1]))
            return (rows + extra).to(rows.dtype)  # summed in float32

        hook = self.table.register_forward_hook(add)
        try:
            return self.loss_of(batch)
        finally:
            hook.remove()


def noise(batch: Batch, width: int, alpha: float, *, device: torch.device | None = None) -> Tensor:
    """[B, T, width] float32: each token's own, in steps of 2⁻¹⁵ of the largest; zero at padding and virtual tokens."""
    assert batch.keys is not None
    mask, virtual = batch.attention_mask, batch.virtual // len(batch.examples)
    lengths = batch.lengths if mask is None else mask.sum(dim=1).tolist()
    assert lengths is not None
    largest = torch.tensor([alpha / math.sqrt((length - virtual) * width) for length in lengths])
    each = largest.repeat_interleave(torch.tensor(lengths)) if mask is None else (largest[:, None] * mask).flatten()
    each *= batch.position_ids.flatten() >= virtual
    uniform = (lanes(batch.keys.to(device), _SITE, width) + 0.5) / 32768 - 1
    return (uniform * each.to(device)[:, None]).view(*batch.input_ids.shape, width)
