"""AdamW over the trained parameters, with decay only where it belongs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import Parameter

from truetune.optim.groups import parameter_groups


def adamw(
    parameters: Mapping[str, Parameter], *, lr: float, weight_decay: float, lora_plus_ratio: float = 1.0
) -> torch.optim.AdamW:
    """torch's fused AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), betas (0.9, 0.999), eps 1e-8.

    What decays, and what learns faster, is as in ``parameter_groups``.
    """
    groups = parameter_groups(parameters, weight_decay=weight_decay, lora_plus_ratio=lora_plus_ratio)
    return torch.optim.AdamW(groups, lr=lr, fused=True)
