"""Attention over keys and values that are kept in pages, as a server keeps those of many texts (Kwon et al. 2023,
arXiv:2309.06180, section 4): each text has a list of pages, and texts that begin alike can share their first ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Segment:
    """The new tokens of one text among those that are computed together.

    Attributes:
        start: tokens of the text that are in its pages already.
        count: new ones, at positions ``start`` … ``start + count - 1``.
        pages: [m] int64, the text's pages in order, with room for the new ones.
    """

    start: int
    count: int
    pages: Tensor

    @property
    def end(self) -> int:
        """Tokens of the text once the new ones are computed."""
        return self.start + self.count


def places(segments: Sequence[Segment], page: int) -> Tensor:
    """[n] int64: the row of each new token among the rows of all pages.

    Args:
        page: tokens of a page.
    """
    rows = []
    for segment in segments:
        positions = torch.arange(segment.start, segment.end)
        rows.append(segment.pages[positions // page] * page + positions % page)
    return torch.cat(rows)


def write(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> None:
    """Put the new tokens' keys and values [n, kv_heads, d] into the pages [pages, page, kv_heads, d]."""
    keys.flatten(0, 1).index_copy_(0, rows, k)
    values.flatten(0, 1).index_copy_(0, rows, v)


def attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    segments: Sequence[Segment],
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """softmax(q kᵀ · scale) v, each new token over its own text up to itself.

    Args:
        q: [n, heads, d], the new tokens of all segments, one segment after the other.
        keys, values: [pages, page, kv_heads, d], with those of the new tokens written; heads is a multiple of kv_heads.
        scale: default 1 / sqrt(d).
        window: a token sees itself and the ``window - 1`` before it; None or 0 for all before it.
        softcap: scores become ``c · tanh(scores / c)``; None or 0 leaves them.
    Returns:
        [n, heads, d_v] in the dtype of ``q``.
    """
    out, at = [], 0
    for segment in segments:
        own = q[at : at + segment.count]
        out.append(_one(own, keys, values, segment, scale, window or None, softcap or None))
        at += segment.count
    return torch.cat(out)


def _one(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    segment: Segment,
    scale: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    page = keys.shape[1]
    first = 0 if window is None else max(0, segment.start + 1 - window)  # of the oldest token that is still seen
    held = segment.pages[first // page : -(-segment.end // page)]
    skipped = first // page * page
    k, v = (t[held].flatten(0, 1)[: segment.end - skipped].transpose(0, 1)[None] for t in (keys, values))
    mask = None
    if segment.count > 1 or window is not None:
        mask = _visible(segment.start - skipped, segment.end - skipped, window, q.device)
    wide = torch.promote_types(q.dtype, torch.float32) if q.device.type == "cpu" else q.dtype
    rows = q.transpose(0, 1)[None].to(wide)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if softcap is None:
        mixed = F.scaled_dot_product_attention(
            rows, k.to(wide), v.to(wide), attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    else:
        times = q.shape[1] // k.shape[1]
        scores = rows @ k.to(wide).repeat_interleave(times, dim=1).mT * scale
        scores = softcap * torch.tanh(scores / softcap)
        scores = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
        mixed = scores.softmax(-1) @ v.to(wide).repeat_interleave(times, dim=1)
    return mixed[0].transpose(0, 1).to(q.dtype)


def _visible(start: int, end: int, window: int | None, device: torch.device) -> Tensor:
    """[end - start, end] bool: True where a new token (row) may see another (column)."""
    full = torch.ones(end - start, end, dtype=torch.bool, device=device).tril(start)
    return full if window is None else full.triu(start + 1 - window)
