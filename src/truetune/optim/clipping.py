"""Clipping a tensor's gradient at a percentile of its own last hundred norms.

As bitsandbytes had it until 0.49. Unlike a fixed bound it needs no tuning: one outlier among a hundred steps is scaled
down to what is usual for this tensor.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

HISTORY = "gnorm_vec"  # bitsandbytes' key: squared norms
_STEPS = 100


def percentile_scale(state: dict[str, Any], g: Tensor, percentile: int) -> float:
    """What to multiply ``g`` by: min(1, percentile of the last norms / this norm).

    Args:
        state: of the tensor, its ``step`` counted; the norms are kept in it. The first step fills all hundred.
        g: any shape; a norm that is not finite is not kept, and changes nothing.
        percentile: 1 to 99; 5 clips at the fifth smallest of a hundred norms.
    """
    norm = float(torch.linalg.vector_norm(g, dtype=torch.float32))
    if not math.isfinite(norm):
        return 1.0
    if HISTORY not in state:
        state[HISTORY] = torch.full((_STEPS,), norm * norm, dtype=torch.float32, device=g.device)
    history, now = state[HISTORY], state["step"] % _STEPS
    history[now] = norm * norm
    bound, square = float(history.sort().values[percentile]), float(history[now])  # both rounded to float32
    return math.sqrt(bound / square) if square > bound else 1.0
