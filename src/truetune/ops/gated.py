"""The gated unit of a feed-forward layer, act(gate) · up (Shazeer 2020, arXiv:2002.05202), with its gradient.

Evaluated in float32 (float64 stays what it is) and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from truetune.errors import ConfigError, nearest
from truetune.ops import buffers, dispatch
from truetune.ops.native import elementwise

_Activation = Callable[[Tensor], tuple[Tensor, Tensor]]


def gated(gate: Tensor, up: Tensor, kind: str, *, out: Tensor | None = None) -> Tensor:
    """Computes act(gate) · up.

    Args:
        gate, up: [n, i] of one dtype; slices of a fused [n, 2 i] tensor are read where they are.
        kind: ``silu``, ``gelu`` (with erf), ``gelu_tanh`` or ``relu``.
        out: where to put the result; it may be ``gate`` or ``up`` itself.
    Returns:
        [n, i] in the dtype of ``gate``.
    Raises:
        ConfigError: another kind.
    """
    activation = _activation(kind)
    out = buffers.empty_like(gate) if out is None else out
    library = dispatch.native(gate, up, out)
    if library and _readable(gate, up, out):
        elementwise.gated(library, gate, up, kind, out)
        return out
    act, _ = activation(_wide(gate))
    return out.copy_(act * _wide(up))


def gated_backward(
    g: Tensor, gate: Tensor, up: Tensor, kind: str, *, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up, given that of the result.

    Args:
        g, gate, up: [n, i] of one dtype.
        kind: as in ``gated``.
        out: where to put the two; they may be ``gate`` and ``up`` themselves, or slices of a fused [n, 2 i] tensor.
    Returns:
        d_gate and d_up, [n, i] in the dtype of ``gate``.
    Raises:
        ConfigError: another kind.
    """
    activation = _activation(kind)
    if out is None:
        out = buffers.empty_like(gate), buffers.empty_like(gate)
    library = dispatch.native(g, gate, up, *out)
    if library and _readable(g, gate, up, *out):
        elementwise.gated_backward(library, g, gate, up, kind, *out)
        return out
    act, derivative = activation(_wide(gate))
    wide = _wide(g)
    d_gate, d_up = wide * _wide(up) * derivative, wide * act
    return out[0].copy_(d_gate), out[1].copy_(d_up)


def _readable(*tensors: Tensor) -> bool:
    """Whether the native kernel can walk these: two axes, one dtype and shape, dense rows."""
    like = tensors[0].dtype, tensors[0].shape
    return tensors[0].dim() == 2 and all((t.dtype, t.shape) == like and t.stride(1) == 1 for t in tensors)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _activation(kind: str) -> _Activation:
    if kind not in _ACTIVATIONS:
        close = nearest(kind, _ACTIVATIONS)
        raise ConfigError(f"activation {kind!r}: expected {', '.join(_ACTIVATIONS)}", ("did you mean", close))
    return _ACTIVATIONS[kind]


def _silu(x: Tensor) -> tuple[Tensor, Tensor]:
    s = torch.sigmoid(x)
    return x * s, s * (1 + x * torch.sigmoid(-x))


def _gelu(x: Tensor) -> tuple[Tensor, Tensor]:
    normal = 0.5 * torch.erfc(x * -math.sqrt(0.5))  # erfc keeps the digits that 1 + erf loses below 0
    return x * normal, normal + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _gelu_tanh(x: Tensor) -> tuple[Tensor, Tensor]:
    # (1 + tanh(a)) / 2 = sigmoid(2 a), a = sqrt(2 / pi) (x + 0.044715 x³), and again without 1 + tanh
    u = math.sqrt(8 / math.pi) * (x + 0.044715 * x**3)
    s = torch.sigmoid(u)
    return x * s, s * (1 + x * torch.sigmoid(-u) * math.sqrt(8 / math.pi) * (1 + 3 * 0.044715 * x * x))


def _relu(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.relu(x), 1 - (x <= 0).to(x.dtype)


_ACTIVATIONS: dict[str, _Activation] = dict(zip(elementwise.KINDS, (_silu, _gelu, _gelu_tanh, _relu), strict=True))
