"""Attention by loops over heads, queries and keys."""

import math

import torch
from torch import Tensor


def slow_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], *, window: int | None = None, softcap: float | None = None
) -> Tensor:
    """[1, heads, T, d] in float64: a query sees the keys of its own segment that are not after it, nor too far back."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros_like(q)
    segment = [number for number, length in enumerate(lengths) for _ in range(length)]
    for head in range(q.shape[1]):
        shared = head * k.shape[1] // q.shape[1]
        for i in range(q.shape[2]):
            seen = [j for j in range(i + 1) if segment[j] == segment[i] and (window is None or i - j < window)]
            scores = [float(q[0, head, i] @ k[0, shared, j]) / math.sqrt(q.shape[3]) for j in seen]
            if softcap is not None:
                scores = [softcap * math.tanh(score / softcap) for score in scores]
            top = max(scores)
            weights = [math.exp(score - top) for score in scores]
            for weight, j in zip(weights, seen, strict=True):
                out[0, head, i] += weight / sum(weights) * v[0, shared, j]
    return out
