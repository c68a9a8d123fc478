"""Frozen projections of one input, each with a low-rank path beside it, as one node of the graph.

    y_i = W_i x + b_i + s_i B_i A_i drop(x)        (Hu et al. 2021, arXiv:2106.09685, section 4)

Frozen weights need two products per token, not three, and nothing but x for the gradients of A and B. So x is kept
once for all projections that read it, the A_i are stacked into one thin product, and the low-rank part is added into
the base's output. Where x comes from something cheap (a norm, a gated activation), that is a ``Source``: its own
inputs are kept, and x is computed again in the backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from truetune.ops import buffers, gated, norm
from truetune.ops.dropout import dropout as drop
from truetune.ops.frozen import FrozenWeight


@dataclass(frozen=True)
class Projection:
    """One frozen map, and its low-rank path if it has one."""

    weight: FrozenWeight
    bias: Tensor | None = None  # [out], frozen
    a: Tensor | None = None  # [r, in], trained
    b: Tensor | None = None  # [out, r], trained
    scale: float = 1.0


@dataclass(frozen=True)
class Group:
    """Projections that read the same input, with one dropout mask for it.

    Attributes:
        keys: [n] int64, the counters that the mask derives from; None where nothing is dropped.
        site: tells the masks of different groups apart.
    """

    projections: tuple[Projection, ...]
    dropout: float = 0.0
    keys: Tensor | None = None
    site: int = 0

    @property
    def adapted(self) -> list[int]:
        """The projections that have a low-rank path."""
        return [i for i, p in enumerate(self.projections) if p.a is not None]

    def drop(self, x: Tensor) -> Tensor:
        """The low-rank paths' input; of a gradient, its backward."""
        return x if self.keys is None else drop(x, self.dropout, self.keys, self.site)


class Source(Protocol):
    """What turns the kept inputs into x."""

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """``(x, what the backward needs beside the inputs)``."""

    def backward(self, g: Tensor, memo: Tensor | None, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The inputs' gradients."""


class Plain:
    """x itself."""

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """[n, in], as it is."""
        return inputs[0], None

    def backward(self, g: Tensor, memo: Tensor | None, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The gradient, as it is."""
        return (g,)


@dataclass(frozen=True)
class Normed:
    """RMSNorm of one input, with a frozen weight."""

    weight: Tensor | None
    eps: float
    offset: float = 0.0

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """[n, in], normalised."""
        return norm.rms_norm(inputs[0], self.weight, self.eps, offset=self.offset)

    def backward(self, g: Tensor, memo: Tensor | None, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Of the norm's input."""
        assert memo is not None
        return (norm.rms_norm_backward(g, inputs[0], self.weight, memo, offset=self.offset),)


@dataclass(frozen=True)
class Gated:
    """act(gate) · up (Shazeer 2020, arXiv:2002.05202)."""

    kind: str

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """[n, inner] of gate and up, both [n, inner]."""
        gate, up = inputs
        return gated.gated(gate, up, self.kind), None

    def backward(self, g: Tensor, memo: Tensor | None, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Of gate and up."""
        gate, up = inputs
        return gated.gated_backward(g, gate, up, self.kind, out=(g, buffers.empty_like(g)))  # g is nobody else's


PLAIN = Plain()


def project(
    group: Group, *inputs: Tensor, source: Source = PLAIN, residual: Tensor | None = None, keep: bool = False
) -> tuple[Tensor, ...]:
    """All projections of a group.

    Args:
        inputs: [n, …] each, what ``source`` makes x [n, in] of.
        residual: [n, out], added to the output of a group of one.
        keep: keep x for the backward rather than make it again.
    Returns:
        One [n, out] per projection, in the dtype of x.
    """
    low_rank = [t for i in group.adapted for t in (group.projections[i].a, group.projections[i].b)]
    call = _Call(group, source, len(inputs), residual is not None, keep)
    assert residual is None or len(group.projections) == 1
    extra = () if residual is None else (residual,)
    outputs: tuple[Tensor, ...] = _Project.apply(call, *inputs, *extra, *low_rank)  # type: ignore[no-untyped-call]
    return outputs


@dataclass(frozen=True)
class _Call:
    group: Group
    source: Source
    inputs: int
    has_residual: bool
    keep: bool

    def stacked(self, low_rank: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        """A's of all adapted projections, [R, in], and s B of each, [out, r]: cast from their masters once."""
        a = torch.cat([t.to(dtype) for t in low_rank[0::2]]) if len(low_rank) > 2 else low_rank[0].to(dtype)
        scales = [self.group.projections[i].scale for i in self.group.adapted]
        return a, [(t * s).to(dtype) for t, s in zip(low_rank[1::2], scales, strict=True)]

    def outputs(self, x: Tensor, h: Sequence[Tensor], scaled_b: Sequence[Tensor]) -> list[Tensor]:
        """W x + b + (s B) h of each projection."""
        result = [p.weight.matmul(x, p.bias) for p in self.group.projections]
        for i, low, b in zip(self.group.adapted, h, scaled_b, strict=True):
            result[i] = result[i].addmm_(low, b.T)
        return result


class _Project(torch.autograd.Function):
    """See the module. Gradients of the frozen weights are never formed."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs, rest = tensors[: call.inputs], tensors[call.inputs :]
        low_rank = rest[1:] if call.has_residual else rest
        x, memo = call.source.forward(*inputs)
        a, scaled_b, h = x, list[Tensor](), list[Tensor]()
        if low_rank:
            a, scaled_b = call.stacked(low_rank, x.dtype)
            h = _split(call.group.drop(x) @ a.T, scaled_b)
        outputs = call.outputs(x, h, scaled_b)
        if call.has_residual:
            outputs[0] += rest[0]
        ctx.call = call
        kept = (x if low_rank else None, memo) if call.keep else ()
        ctx.save_for_backward(*inputs, *kept, *([a, *scaled_b, *h] if low_rank else []))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        tensors = ctx.saved_tensors  # asked for once: a recomputing checkpoint hands them out only once
        inputs, rest = tensors[: call.inputs], tensors[call.inputs :]
        wants_x, count = any(ctx.needs_input_grad[1 : 1 + call.inputs]), len(call.group.adapted)
        if call.keep:
            (x, memo), rest = rest[:2], rest[2:]
        else:
            x, memo = call.source.forward(*inputs)
        dh, of_low_rank = None, list[Tensor]()
        if count:
            dh, of_low_rank = _low_rank_backward(call, grads, x, rest[1 : 1 + count], rest[1 + count :])
        dx = _input_gradient(call, grads, dh, rest[0] if count else None) if wants_x else None
        of_inputs = call.source.backward(dx, memo, *inputs) if dx is not None else (None,) * call.inputs
        return (None, *of_inputs, *([grads[0]] if call.has_residual else []), *of_low_rank)


def _split(h: Tensor, scaled_b: Sequence[Tensor]) -> list[Tensor]:
    """h [n, R] by the ranks of the projections."""
    if len(scaled_b) == 1:
        return [h]
    return [part.contiguous() for part in torch.split(h, [b.shape[1] for b in scaled_b], dim=1)]


def _low_rank_backward(
    call: _Call, grads: Sequence[Tensor], x: Tensor, scaled_b: Sequence[Tensor], h: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """``(dh [n, R]; dA and dB of each adapted projection)``: dh = g s B, dA = dhᵀ drop(x), dB = s gᵀ h."""
    of_adapted = [grads[i] for i in call.group.adapted]
    parts = [g @ b for g, b in zip(of_adapted, scaled_b, strict=True)]
    dh = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
    of_a = torch.split(dh.T @ call.group.drop(x), [b.shape[1] for b in scaled_b])
    scales = [call.group.projections[i].scale for i in call.group.adapted]
    of_b = [(low.T @ g).T * s for g, low, s in zip(of_adapted, h, scales, strict=True)]
    return dh, [t for pair in zip(of_a, of_b, strict=True) for t in pair]


def _input_gradient(call: _Call, grads: Sequence[Tensor], dh: Tensor | None, a: Tensor | None) -> Tensor:
    """dx = Σ g_i W_i + drop(dh A)."""
    dx: Tensor | None = None
    for p, g in zip(call.group.projections, grads, strict=True):
        dx = p.weight.matmul_t(g, into=dx)
    assert dx is not None
    if dh is None or a is None:
        return dx
    return dx.addmm_(dh, a) if call.group.keys is None else dx.add_(call.group.drop(dh @ a))
