"""Frozen projections of one input, each with a low-rank path beside it, as one node of the graph.

    y_i = g_i ∘ (W_i x + s_i B_i A_i drop(x)) + b_i + c_i

Without the factor g this is LoRA (Hu et al. 2021, arXiv:2106.09685, section 4); with one number per output it is DoRA
(Liu et al. 2024, arXiv:2402.09353), g = m / |W + s B A|. c is a trained bias.

Frozen weights need two products per token, not three, and nothing but x for the gradients of A and B. So x is kept
once for all projections that read it, the A_i are stacked into one thin product, and the low-rank part is added into
the base's output. Where x comes from something cheap, that is a ``source.Source``, and x is computed again in the
backward. The gradient of g needs what g multiplied: it is read off the
output, which who comes after this node keeps anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from truetune.ops import rescale, thin
from truetune.ops.dropout import Mask
from truetune.ops.frozen import FrozenWeight
from truetune.ops.source import PLAIN, Source


@dataclass(frozen=True)
class Projection:
    """One frozen map, and what is trained beside it."""

    weight: FrozenWeight
    bias: Tensor | None = None  # [out], frozen
    a: Tensor | None = None  # [r, in], trained
    b: Tensor | None = None  # [out, r], trained
    scale: float = 1.0
    magnitude: Tensor | None = None  # [out], trained: the factor g; where it is exactly 0 it gets no gradient
    shift: Tensor | None = None  # [out], trained, added to the output

    @property
    def learned(self) -> tuple[Tensor, ...]:
        """What gets a gradient, in the order in which the node takes it."""
        return tuple(t for t in (self.a, self.b, self.magnitude, self.shift) if t is not None)

    def constant(self, dtype: torch.dtype) -> Tensor | None:
        """Computes b + c, [out]."""
        if self.shift is None:
            return self.bias
        return (self.shift if self.bias is None else self.shift + self.bias).to(dtype)


@dataclass(frozen=True)
class Group:
    """Projections that read the same input, with one dropout mask for it.

    Attributes:
        keys: [n] int64, the counters that the mask derives from; None where nothing is dropped.
        site: tells the masks of different groups apart.
        drops_base: what a magnitude adds to W x is of the dropped input as well, y = W x + (g - 1) ∘ W drop(x) + …, as
            PEFT defines DoRA's dropout; that takes a second product with W, forwards and backwards.
    """

    projections: tuple[Projection, ...]
    dropout: float = 0.0
    keys: Tensor | None = None
    site: int = 0
    drops_base: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Of the products, and so of x."""
        return self.projections[0].weight.dtype

    @property
    def adapted(self) -> list[int]:
        """The projections that have a low-rank path."""
        return [i for i, p in enumerate(self.projections) if p.a is not None]

    @property
    def twice(self) -> bool:
        """Whether W is multiplied with the dropped input as well."""
        return self.drops_base and self.keys is not None and any(p.magnitude is not None for p in self.projections)

    @property
    def mask(self) -> Mask | None:
        """Of the low-rank paths' input."""
        return None if self.keys is None or not self.dropout else Mask(self.dropout, self.keys, self.site)

    def drop(self, x: Tensor) -> Tensor:
        """The low-rank paths' input; of a gradient, its backward."""
        return x if self.mask is None else self.mask.on(x)


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
    learned = [t for p in group.projections for t in p.learned]
    call = _Call(group, source, len(inputs), residual is not None, keep)
    assert residual is None or len(group.projections) == 1
    extra = () if residual is None else (residual,)
    outputs: tuple[Tensor, ...] = _Project.apply(call, *inputs, *extra, *learned)  # type: ignore[no-untyped-call]
    return outputs


@dataclass(frozen=True)
class _Call:
    group: Group
    source: Source
    inputs: int
    has_residual: bool
    keep: bool

    def cast(self, dtype: torch.dtype) -> list[Tensor]:
        """A's of all adapted projections, [R, in], then s B of each, [out, r]: cast from their masters once."""
        pairs = [(p.a, p.b, p.scale) for p in self.group.projections if p.a is not None and p.b is not None]
        if not pairs:
            return []
        stacked = [a.to(dtype) for a, _, _ in pairs]
        return [torch.cat(stacked) if len(pairs) > 1 else stacked[0], *((b * s).to(dtype) for _, b, s in pairs)]

    def output(
        self, p: Projection, x: Tensor, low: Tensor, h: Tensor | None, b: Tensor | None, *, residual: Tensor | None
    ) -> _Output:
        """One projection of x [n, in], where ``low`` is drop(x), ``h`` is A drop(x) and ``b`` is s B."""
        if p.magnitude is None:
            y = p.weight.matmul(x, p.constant(x.dtype))
            if h is not None and b is not None:
                return _Output(thin.add(y, h, b, residual=residual))
            return _Output(y if residual is None else y.add_(residual))
        return self.scaled_output(p, x, low, h, b, residual=residual)

    def scaled_output(
        self, p: Projection, x: Tensor, low: Tensor, h: Tensor | None, b: Tensor | None, *, residual: Tensor | None
    ) -> _Output:
        """The same of a projection with a magnitude."""
        assert p.magnitude is not None
        scaled = p.weight.matmul(low if self.group.twice else x)
        scaled = scaled if h is None or b is None else thin.add(scaled, h, b)
        if self.group.twice:
            y = p.weight.matmul(x - low, p.constant(x.dtype))
            y = rescale.add_(y, scaled, p.magnitude)
            return _Output(y if residual is None else y.add_(residual), scaled)
        y = rescale.scale_(scaled, p.magnitude, constant=p.constant(x.dtype), residual=residual)
        return _Output(y, scaled)


@dataclass(frozen=True)
class _Output:
    y: Tensor
    scaled: Tensor | None = None  # g ∘ (W x + s B A x); of a group that drops the base's input, without g


class _Project(torch.autograd.Function):
    """See the module. Gradients of the frozen weights are never formed."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs, group = tensors[: call.inputs], call.group
        x, memo = call.source.forward(*inputs)
        cast, h = call.cast(x.dtype), list[Tensor]()
        low = group.drop(x) if group.twice else x
        if cast:
            h = _split(thin.down(x, cast[0], group.mask), cast[1:])
        paths = dict(zip(group.adapted, zip(h, cast[1:], strict=True), strict=True))
        residual = tensors[call.inputs] if call.has_residual else None
        found = [
            call.output(p, x, low, *paths.get(i, (None, None)), residual=residual)
            for i, p in enumerate(group.projections)
        ]
        ctx.call = call
        kept = (x if cast else None, memo) if call.keep else ()
        scaled = [each.scaled for each in found if each.scaled is not None]
        ctx.save_for_backward(*inputs, *kept, *cast, *h, *scaled)
        return tuple(each.y for each in found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        tensors = ctx.saved_tensors  # asked for once: a recomputing checkpoint hands them out only once
        inputs, rest = tensors[: call.inputs], list(tensors[call.inputs :])
        wants_x, count = any(ctx.needs_input_grad[1 : 1 + call.inputs]), len(call.group.adapted)
        if call.keep:
            (x, memo), rest = rest[:2], rest[2:]
        else:
            x, memo = call.source.forward(*inputs)
        a, rest = (rest[0], rest[1:]) if count else (None, rest)
        scaled_b, h, scaled = rest[:count], rest[count : 2 * count], rest[2 * count :]
        inner, of_magnitude = _through_magnitudes(call.group, grads, scaled)
        dh, of_low_rank = _low_rank_backward(call.group, inner, x, scaled_b, h) if count else (None, [])
        dx = _input_gradient(call.group, grads, inner, dh, a) if wants_x else None
        of_inputs = call.source.backward(dx, memo, *inputs) if dx is not None else (None,) * call.inputs
        of_learned = _in_order(call.group, of_low_rank, of_magnitude, grads)
        return (None, *of_inputs, *([grads[0]] if call.has_residual else []), *of_learned)


def _through_magnitudes(
    group: Group, grads: Sequence[Tensor], scaled: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """``(the gradients of what the magnitudes multiply, all projections'; those of the magnitudes [out])``.

    dg = Σ dy ∘ u, where u is kept as g ∘ u.
    """
    inner, of_magnitude, left = list[Tensor](), list[Tensor](), iter(scaled)
    for p, g in zip(group.projections, grads, strict=True):
        if p.magnitude is None:
            inner.append(g)
            continue
        through, total = rescale.backward(g, next(left), p.magnitude, is_scaled=not group.twice)
        of_magnitude.append(total)
        inner.append(through)
    return inner, of_magnitude


def _split(h: Tensor, scaled_b: Sequence[Tensor]) -> list[Tensor]:
    """h [n, R] by the ranks of the projections."""
    if len(scaled_b) == 1:
        return [h]
    return [part.contiguous() for part in torch.split(h, [b.shape[1] for b in scaled_b], dim=1)]


def _low_rank_backward(
    group: Group, grads: Sequence[Tensor], x: Tensor, scaled_b: Sequence[Tensor], h: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """``(dh [n, R]; dA and dB of each adapted projection)``: dh = g s B, dA = dhᵀ drop(x), dB = s gᵀ h."""
    scales = [group.projections[i].scale for i in group.adapted]
    dh, of_b = thin.backward([grads[i] for i in group.adapted], h, scaled_b, scales)
    of_a = torch.split(thin.across(dh, x, group.mask), [b.shape[1] for b in scaled_b])
    return dh, [t for pair in zip(of_a, of_b, strict=True) for t in pair]


def _input_gradient(
    group: Group, grads: Sequence[Tensor], inner: Sequence[Tensor], dh: Tensor | None, a: Tensor | None
) -> Tensor:
    """dx = Σ inner_i W_i + drop(dh A), where ``inner`` are the gradients of what the magnitudes multiply."""
    dx: Tensor | None = None
    for p, g in zip(group.projections, grads if group.twice else inner, strict=True):
        dx = p.weight.matmul_t(g, into=dx)
    assert dx is not None
    if dh is None or a is None:
        return dx.add_(group.drop(_of_dropped(group, grads, inner))) if group.twice else dx
    if group.twice:
        return dx.add_(group.drop(_of_dropped(group, grads, inner).addmm_(dh, a)))
    return thin.add(dx, dh, a.T.contiguous(), mask=group.mask)


def _of_dropped(group: Group, grads: Sequence[Tensor], inner: Sequence[Tensor]) -> Tensor:
    """Σ (inner_i - dy_i) W_i: what the second products with W hand back to the dropped input."""
    dx: Tensor | None = None
    for p, g, scaled in zip(group.projections, grads, inner, strict=True):
        if p.magnitude is not None:
            dx = p.weight.matmul_t(scaled - g, into=dx)
    assert dx is not None
    return dx


def _in_order(
    group: Group, of_low_rank: Sequence[Tensor], of_magnitude: Sequence[Tensor], grads: Sequence[Tensor]
) -> list[Tensor]:
    """The gradients of what is learned, as ``Projection.learned`` lists it."""
    low_rank, magnitude, found = iter(of_low_rank), iter(of_magnitude), list[Tensor]()
    for p, g in zip(group.projections, grads, strict=True):
        found += [next(low_rank), next(low_rank)] if p.a is not None else []
        found += [next(magnitude)] if p.magnitude is not None else []
        found += [g.sum(0)] if p.shift is not None else []
    return found
