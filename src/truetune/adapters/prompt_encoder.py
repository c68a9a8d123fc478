"""The small networks that make virtual tokens while they are trained, with PEFT's names and sizes.

    P-tuning:  rows = MLP(E) or MLP(LSTM(E))       Liu et al. 2021, arXiv:2103.10385, section 3.2
    prefix:    rows = W2 tanh(W1 E + b1) + b2      Li & Liang 2021, arXiv:2101.00190, section 4.3

Only what they make is in an adapter's file. A run's checkpoints keep the networks, so that it goes on exactly.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from truetune.ops.rng import derive_seed


class MLPEncoder(nn.Module):
    """[n, width] from trained embeddings, through three maps."""

    def __init__(self, count: int, width: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(count, width)
        self.mlp_head = nn.Sequential(
            nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, width)
        )

    def forward(self) -> Tensor:
        """[n, width]."""
        rows: Tensor = self.mlp_head(self.embedding.weight)
        return rows


class LSTMEncoder(nn.Module):
    """[n, width] from trained embeddings, read in both directions by two layers."""

    def __init__(self, count: int, width: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(count, width)
        self.lstm_head = nn.LSTM(width, hidden, num_layers=2, bidirectional=True, batch_first=True)
        self.mlp_head = nn.Sequential(nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, width))

    def forward(self) -> Tensor:
        """[n, width]."""
        rows: Tensor = self.mlp_head(self.lstm_head(self.embedding.weight[None])[0])[0]
        return rows


class PrefixEncoder(nn.Module):
    """[n, out] from trained embeddings of ``width``, through two maps."""

    def __init__(self, count: int, width: int, hidden: int, out: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(count, width)
        self.transform = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, out))

    def forward(self) -> Tensor:
        """[n, out]."""
        rows: Tensor = self.transform(self.embedding.weight)
        return rows


def started(make: Callable[[], nn.Module], seed: int, *purpose: str, device: torch.device) -> nn.Module:
    """A network with the start that torch gives its layers, as a function of the run's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, *purpose))
        return make().to(device)
