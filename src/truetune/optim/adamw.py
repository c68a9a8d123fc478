"""AdamW over the trained parameters, with decay only where it belongs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import Parameter


def adamw(parameters: Mapping[str, Parameter], *, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """torch's fused AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), betas (0.9, 0.999), eps 1e-8.

    Matrices decay; biases and norms (one dimension) do not.
    """
    decayed = [p for p in parameters.values() if p.ndim > 1]
    plain = [p for p in parameters.values() if p.ndim <= 1]
    groups = [
        {"params": params, "weight_decay": decay} for params, decay in ((decayed, weight_decay), (plain, 0.0)) if params
    ]
    return torch.optim.AdamW(groups, lr=lr, fused=True)
