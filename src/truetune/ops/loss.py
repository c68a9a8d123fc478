"""Cross-entropy as a sum and a count.

Never a mean: the step divides by the trained tokens of the whole optimizer step, so the loss does not depend on how
the step was cut into micro-batches.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Computes ``F.cross_entropy(logits.float(), targets, reduction="sum")``; float64 stays what it is.

    Args:
        logits: [n, vocab], any floating dtype; the softmax is taken in float32.
        targets: [n] int64 in [0, vocab).
    Returns:
        A float32 scalar; 0 with a gradient of zeros when n = 0.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), targets, reduction="sum")
