"""Causal attention over packed segments: each segment sees itself and nothing else, and no mask is ever built."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from truetune.ops import dispatch
from truetune.ops.native import attention as native
from truetune.ops.native.attention import Heads, Rule
from truetune.ops.native.library import Library


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
        window: a token sees itself and the ``window - 1`` before it; None or 0 for all before it.
        softcap: scores become ``c · tanh(scores / c)`` (Gemma 2, arXiv:2408.00118); None or 0 leaves them.
        dropout: share of the attention weights that is dropped; the native kernel has none.
    Returns:
        [1, heads, T, d] in the dtype of ``q``.
    Raises:
        ValueError: the lengths do not sum to T.
    """
    rule = _rule(q.shape[2], q.shape[3], lengths, scale, window, softcap)
    q, k, v = (_as_autocast(t) for t in (q, k, v))
    if not dropout and q.shape[0] == 1:
        heads = [t[0].transpose(0, 1) for t in (q, k, v)]
        if library := _native(*heads):
            mixed: Tensor = _Native.apply(library, rule, *heads, None, None)  # type: ignore[no-untyped-call]
            return mixed.transpose(0, 1)[None]
    return _by_segment(q, k, v, rule, dropout)


def rotary_segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    *,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The same with tokens first, as projections give them, and with rotary positions (Su et al., arXiv:2104.09864).

    Args:
        q: [n, heads, d].
        k, v: [n, kv_heads, d].
        lengths: tokens of each segment, summing to n.
        cos, sin: [n, rotary], the halves repeated as transformers does it; the first ``rotary`` dimensions of q and k
            are turned by them. They get no gradient from the native kernel.
        scale, window, softcap: as ``segment_attention``.
    Returns:
        [n, heads, d] in the dtype of ``q``.
    Raises:
        ValueError: the lengths do not sum to n, or cos and sin are not [n, rotary].
    """
    rule = _rule(q.shape[0], q.shape[2], lengths, scale, window, softcap)
    angles = [t for t in (cos, sin) if t is not None]
    if angles and (len(angles) == 1 or not _are_angles(q, *angles)):
        raise ValueError(f"cos and sin are {[list(t.shape) for t in angles]}, the tokens {list(q.shape)}")
    if library := _native(q, k, v, *angles):
        mixed: Tensor = _Native.apply(library, rule, q, k, v, cos, sin)  # type: ignore[no-untyped-call]
        return mixed
    if cos is not None and sin is not None:
        q, k = turned(q, cos, sin), turned(k, cos, sin)
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    return _by_segment(q, k, v, rule)[0].transpose(0, 1)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: dimension i turns with dimension i + rotary / 2; what lies beyond ``rotary`` stays.

    Args:
        x: [n, heads, d].
        cos, sin: [n, rotary].
    Returns:
        [n, heads, d] in the dtype of ``x``, rounded once.
    """
    rotary = cos.shape[1]
    wide = x[..., :rotary].to(torch.promote_types(x.dtype, torch.float32))
    low, high = wide.chunk(2, dim=-1)
    wide = wide * cos[:, None] + torch.cat([-high, low], dim=-1) * sin[:, None]
    return torch.cat([wide.to(x.dtype), x[..., rotary:]], dim=-1)


class _Native(torch.autograd.Function):
    """The native pair; keeps its inputs, its output and one number per query."""

    @staticmethod
    def forward(
        ctx: Any, library: Library, rule: Rule, q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None
    ) -> Tensor:
        q, k, v = (native.by_token(t) for t in (q, k, v))
        if cos is not None and sin is not None:
            cos, sin = cos.contiguous(), sin.to(cos.dtype).contiguous()
        out, lse = native.forward(library, Heads(q, k, v, cos, sin), rule=rule)
        ctx.library, ctx.rule = library, rule
        ctx.save_for_backward(q, k, v, out, lse, cos, sin)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, cos, sin = ctx.saved_tensors
        ctx.library.use_threads(torch.get_num_threads())
        heads = Heads(q, k, v, cos, sin)
        grads = native.backward(ctx.library, heads, rule=ctx.rule, dout=dout, out=out, lse=lse)
        wanted = ctx.needs_input_grad[2:5]
        return (None, None, *(grad if want else None for grad, want in zip(grads, wanted, strict=True)), None, None)


def _native(q: Tensor, k: Tensor, v: Tensor, *angles: Tensor) -> Library | None:
    """The library, if it can take these: it checks no shape, and what torch refuses must come to torch."""
    n, heads, dim = q.shape
    shared = k.ndim == 3 and k.shape == v.shape == (n, k.shape[1], dim) and k.shape[1] and heads % k.shape[1] == 0
    alike = q.dtype == k.dtype == v.dtype and not any(t.requires_grad for t in angles)
    return dispatch.native(q, k, v, *angles) if shared and alike and dim <= native.MAX_DIM else None


def _are_angles(q: Tensor, cos: Tensor, sin: Tensor) -> bool:
    rotary = cos.shape[-1]
    return cos.shape == sin.shape == (len(q), rotary) and rotary % 2 == 0 and rotary <= q.shape[2]


def _rule(
    tokens: int, dim: int, lengths: Sequence[int], scale: float | None, window: int | None, softcap: float | None
) -> Rule:
    if sum(lengths) != tokens or min(lengths, default=0) < 0:
        raise ValueError(f"the segments have {sum(lengths)} tokens in all, the tensors {tokens}")
    return Rule(tuple(lengths), dim**-0.5 if scale is None else scale, window or None, softcap or None)


def _by_segment(q: Tensor, k: Tensor, v: Tensor, rule: Rule, dropout: float = 0.0) -> Tensor:
    """The reference: torch's fused attention, one segment after the other."""
    if q.device.type == "cpu" and q.dtype.itemsize < 4:
        # torch compiles and keeps a bf16 kernel for every segment length it meets, some 3 MB each: 220 lengths took
        # 1.1 GB. In float32 it keeps nothing, is twice as fast at these sizes, and is closer to the truth.
        with torch.autocast("cpu", enabled=False):  # which would turn them back
            return _by_segment(q.float(), k.float(), v.float(), rule, dropout).to(q.dtype)
    parts = (torch.split(t, list(rule.lengths), dim=2) for t in (q, k, v))
    return torch.cat([_one_segment(*qkv, rule=rule, dropout=dropout) for qkv in zip(*parts, strict=True)], dim=2)


def _as_autocast(x: Tensor) -> Tensor:
    """As torch's fused attention would take it; rotary positions leave q and k in float32 beside a v in bf16."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def _one_segment(q: Tensor, k: Tensor, v: Tensor, *, rule: Rule, dropout: float) -> Tensor:
    length, window = q.shape[2], rule.window
    mask = band_mask(length, window, q.device) if window is not None and length > window else None
    if rule.softcap is not None:
        weights = _softcapped(q, k, scale=rule.scale, softcap=rule.softcap, mask=mask)
        return F.dropout(weights, dropout, bool(dropout)).to(v.dtype) @ _repeated(v, q.shape[1])
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=rule.scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip


def band_mask(length: int, window: int | None, device: torch.device) -> Tensor:
    """[length, length] bool: True where a query (row) may see a key (column)."""
    full = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return full if window is None else full.triu(1 - window)


def _softcapped(q: Tensor, k: Tensor, *, scale: float, softcap: float, mask: Tensor | None) -> Tensor:
    """Attention weights of capped scores; torch's fused kernel has no such option, so those of one segment exist."""
    scores = q @ _repeated(k, q.shape[1]).mT
    scores = scores.to(torch.promote_types(q.dtype, torch.float32)) * scale
    scores = softcap * torch.tanh(scores / softcap)
    allowed = band_mask(q.shape[2], None, q.device) if mask is None else mask
    return scores.masked_fill(~allowed, float("-inf")).softmax(-1)


def _repeated(x: Tensor, heads: int) -> Tensor:
    """Each key or value head once per query head that reads it."""
    return x.repeat_interleave(heads // x.shape[1], dim=1)
