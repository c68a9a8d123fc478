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
    dropout: float = 0.0,
) -> Tensor:
    """softmax(q kᵀ · scale) v within each segment, causal.

    Args:
        q: [1, heads, T, d].
        k, v: [1, kv_heads, T, d]; heads is a multiple of kv_heads.
        lengths: tokens of each segment, summing to T.
        scale: default 1 / sqrt(d).
        window: a token sees itself and the ``window - 1`` before it.
        softcap: scores become ``c · tanh(scores / c)`` (Gemma 2, arXiv:2408.00118).
        dropout: share of the attention weights that is dropped.
    Returns:
        [1, heads, T, d] in the dtype of ``q``.
    """
    if q.device.type == "cpu" and q.dtype.itemsize < 4:
        # torch compiles and keeps a bf16 kernel for every segment length it meets, some 3 MB each: 220 lengths took
        # 1.1 GB. In float32 it keeps nothing, is twice as fast at these sizes, and is closer to the truth.
        wide = segment_attention(
            q.float(), k.float(), v.float(), lengths, scale=scale, window=window, softcap=softcap, dropout=dropout
        )
        return wide.to(q.dtype)
    outputs = []
    for qs, ks, vs in zip(*(torch.split(t, list(lengths), dim=2) for t in (q, k, v)), strict=True):
        length = qs.shape[2]
        mask = band_mask(length, window, q.device) if window is not None and length > window else None
        if softcap is not None:
            weights = _softcapped(qs, ks, scale=scale, softcap=softcap, mask=mask)
            outputs.append(F.dropout(weights, dropout, bool(dropout)).to(v.dtype) @ _repeated(vs, q.shape[1]))
        else:
            outputs.append(
                F.scaled_dot_product_attention(
                    qs, ks, vs, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scale,
                    enable_gqa=q.shape[1] != k.shape[1],
                )
            )  # fmt: skip
    return torch.cat(outputs, dim=2)


def band_mask(length: int, window: int | None, device: torch.device) -> Tensor:
    """[length, length] bool: True where a query (row) may see a key (column)."""
    full = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return full if window is None else full.triu(1 - window)


def _softcapped(q: Tensor, k: Tensor, *, scale: float | None, softcap: float, mask: Tensor | None) -> Tensor:
    """Attention weights of capped scores; torch's fused kernel has no such option, so those of one segment exist."""
    scores = q @ _repeated(k, q.shape[1]).mT
    scores = scores.to(torch.promote_types(q.dtype, torch.float32)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = softcap * torch.tanh(scores / softcap)
    allowed = band_mask(q.shape[2], None, q.device) if mask is None else mask
    return scores.masked_fill(~allowed, float("-inf")).softmax(-1)


def _repeated(x: Tensor, heads: int) -> Tensor:
    """Each key or value head once per query head that reads it."""
    return x.repeat_interleave(heads // x.shape[1], dim=1)
