"""Softmax cross-entropy of rows of logits; the gradient takes the logits' own place, so no second buffer exists.

With l = c · tanh(z / c) (Gemma 2, arXiv:2408.00118; l = z where c = 0), p = softmax(l) over V entries, and s the label
smoothing (Szegedy et al. 2015, arXiv:1512.00567, section 7):

    loss = log Σ exp(l) - (1 - s) l[target] - s mean(l)
    dz   = (p - s / V - (1 - s) [target]) (1 - (l / c)²)
"""

from __future__ import annotations

import torch
from torch import Tensor

from truetune.ops import dispatch
from truetune.ops.native import elementwise


def softmax_cross_entropy_(
    logits: Tensor, targets: Tensor, *, softcap: float = 0.0, smoothing: float = 0.0, grad: bool
) -> Tensor:
    """Computes ``F.cross_entropy(l.float(), targets, reduction="none", label_smoothing=smoothing)``.

    Args:
        logits: [n, V], any floating dtype. With ``grad`` it becomes d(sum of losses) / d(logits as given).
        targets: [n] int64 in [0, V).
        softcap: c above; 0 for none.
        smoothing: s above.
        grad: whether to overwrite the logits.
    Returns:
        [n] float32 (float64 for float64): each row's loss.
    Raises:
        IndexError: a target outside [0, V); on an accelerator, whatever its own indexing raises.
    """
    library = dispatch.native(logits)
    if library and logits.stride(1) == 1:
        return elementwise.cross_entropy_(library, logits, targets, softcap=softcap, smoothing=smoothing, grad=grad)
    if logits.device.type == "cpu" and targets.numel() and not 0 <= targets.min() <= targets.max() < logits.shape[1]:
        raise IndexError(f"targets {int(targets.min())} to {int(targets.max())}: expected 0 to {logits.shape[1] - 1}")
    capped = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap:
        capped = softcap * torch.tanh(capped / softcap)
    log_p, at = torch.log_softmax(capped, 1), targets[:, None]
    losses = -(1 - smoothing) * log_p.gather(1, at).squeeze(1)
    if smoothing:
        losses = losses - smoothing * log_p.mean(1)
    if grad:
        d = log_p.exp() - smoothing / logits.shape[1]
        d.scatter_add_(1, at, d.new_full(at.shape, smoothing - 1))
        logits.copy_(d * (1 - (capped / softcap).square()) if softcap else d)
    return losses
