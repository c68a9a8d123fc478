"""Causal attention over packed segments: each segment sees itself and nothing else, and no mask is ever built."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """softmax(q kᵀ · scale) v within each segment, causal.

    Args:
        q: [1, heads, T, d].
        k, v: [1, kv_heads, T, d]; heads is a multiple of kv_heads.
        lengths: tokens of each segment, summing to T.
        scale: default 1 / sqrt(d).
        window: a token sees itself and the ``window - 1`` before it.
        softcap: scores become ``c · tanh(scores / c)`` (Gemma 2, arXiv:2408.00118).
    Returns:
        [1, heads, T, d] in the dtype of ``q``.
    """
    outputs = []
    for qs, ks, vs in zip(*(torch.split(t, list(lengths), dim=2) for t in (q, k, v)), strict=True):
        length = qs.shape[2]
        mask = band_mask(length, window, q.device) if window is not None and length > window else None
        if softcap is not None:
            outputs.append(_softcapped(qs, ks, vs, scale=scale, softcap=softcap, mask=mask))
        else:
            outputs.append(
                F.scaled_dot_product_attention(
                    qs, ks, vs, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
                )
            )
    return torch.cat(outputs, dim=2)


def band_mask(length: int, window: int | None, device: torch.device) -> Tensor:
    """[length, length] bool: True where a query (row) may see a key (column)."""
    full = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return full if window is None else full.triu(1 - window)


def _softcapped(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, softcap: float, mask: Tensor | None) -> Tensor:
    """Attention with capped scores; torch's fused kernel has no such option, so the scores of one segment exist."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = (q @ k.mT).float() * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = softcap * torch.tanh(scores / softcap)
    allowed = band_mask(q.shape[2], None, q.device) if mask is None else mask
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    return weights.to(v.dtype) @ v
