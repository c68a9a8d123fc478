"""The C kernel of segment attention, on tensors: tokens first, on the CPU, float32 or bfloat16."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from truetune.ops import buffers
from truetune.ops.native.library import Library

MAX_DIM = 256  # TT_MAX_DIM of heads.h
_CODE = {torch.float32: 0, torch.bfloat16: 1}  # TT_FLOAT32 and TT_BFLOAT16 of simd.h
_POINTERS = ("q", "k", "v", "out", "lse", "dout", "dq", "dk", "dv", "cos", "sin")
_STRIDES = ("q_stride", "k_stride", "v_stride", "dout_stride")
_NUMBERS = ("segments", "heads", "kv_heads", "dim", "rotary", "window", "dtype", "rotary_dtype")


class _Call(ctypes.Structure):
    """tt_attention of heads.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        ("edges", ctypes.POINTER(ctypes.c_int32)),
        *((name, ctypes.c_int64) for name in _STRIDES),
        *((name, ctypes.c_int32) for name in _NUMBERS),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


@dataclass(frozen=True)
class Rule:
    """Which keys a query sees, and how their scores are formed.

    Attributes:
        lengths: tokens of each segment, none negative, summing to the tokens there are: nobody checks this again.
        window: a token sees itself and the ``window - 1`` before it; None for all before it.
        softcap: scores become ``c · tanh(scores / c)``; None leaves them.
    """

    lengths: tuple[int, ...]
    scale: float
    window: int | None
    softcap: float | None


@dataclass(frozen=True)
class Heads:
    """What attention reads: on the CPU, q, k and v of one dtype, float32 or bfloat16.

    Attributes:
        q: [n, heads, d]; k, v: [n, kv_heads, d]; laid out as ``by_token`` gives them.
        cos, sin: [n, rotary], dense and of one dtype; both None where nothing is turned.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    cos: Tensor | None
    sin: Tensor | None


def forward(library: Library, heads: Heads, *, rule: Rule) -> tuple[Tensor, Tensor]:
    """The mixed values, and what the backward needs of the weights.

    Returns:
        [n, heads, d] in the dtype of q, and the log-sum of the weights, [heads, n] float32.
    Raises:
        MemoryError: for the kernel's scratch space.
    """
    q = heads.q
    out, lse = _empty_like(q), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    _run(library.functions.tt_attention_forward, _call(rule, heads, out=out, lse=lse))
    return out, lse


def backward(
    library: Library, heads: Heads, *, rule: Rule, dout: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, dense, in their shapes and dtype.

    Args:
        dout: [n, heads, d] in the dtype of q, the gradient of ``out``.
        out, lse: from the forward.
    Raises:
        MemoryError: for the kernel's scratch space.
    """
    dout = by_token(dout)
    dq, dk, dv = (_empty_like(t) for t in (heads.q, heads.k, heads.v))
    call = _call(rule, heads, out=out, lse=lse, dout=dout, dq=dq, dk=dk, dv=dv)
    call.dout_stride = dout.stride(0)
    _run(library.functions.tt_attention_backward, call)
    return dq, dk, dv


def by_token(x: Tensor) -> Tensor:
    """``x`` [n, heads, d] if only its tokens are apart, as in a slice of a fused projection; else a dense copy."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


def _empty_like(x: Tensor) -> Tensor:
    """[n, heads, d], dense. A row holds all heads of a token, as in the projections, so they can share their blocks."""
    return buffers.empty(x.shape[0], x.shape[1:].numel(), x.dtype, x.device).view(x.shape)


def _call(rule: Rule, heads: Heads, **more: Tensor) -> _Call:
    q, k, v, cos, sin = heads.q, heads.k, heads.v, heads.cos, heads.sin
    edges = list(accumulate(rule.lengths, initial=0))
    tensors = {"q": q, "k": k, "v": v, **more}
    call = _Call(**{name: tensor.data_ptr() for name, tensor in tensors.items()})
    call.edges = (ctypes.c_int32 * len(edges))(*edges)
    call.q_stride, call.k_stride, call.v_stride = (t.stride(0) for t in (q, k, v))
    call.segments, call.heads, call.kv_heads, call.dim = len(rule.lengths), q.shape[1], k.shape[1], q.shape[2]
    call.window, call.scale, call.softcap = rule.window or 0, rule.scale, rule.softcap or 0.0
    call.dtype = _CODE[q.dtype]
    if cos is not None and sin is not None:
        call.cos, call.sin = cos.data_ptr(), sin.data_ptr()
        call.rotary, call.rotary_dtype = cos.shape[1], _CODE[cos.dtype]
    return call


def _run(function: ctypes._NamedFuncPointer, call: _Call) -> None:
    if function(ctypes.byref(call)):
        raise MemoryError("attention: no memory for its scratch space")
