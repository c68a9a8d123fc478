"""Groups of projections of every kind, and the plain composition that each stands for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from truetune.ops.dropout import lanes
from truetune.ops.frozen import FrozenLinear
from truetune.ops.projection import Group, Projection, project
from truetune.ops.source import PLAIN, Gated, Normed, Source

SITE, DROPPED, EPS = 7, 0.4, 1e-5
# Of each projection (rank of its low-rank path or 0, has a bias, is stored as [in, out]).
GROUPS = {
    "one": [(5, True, False)],
    "one-transposed": [(1, True, True)],
    "one-frozen": [(0, True, False)],
    "two": [(1, False, False), (5, False, True)],
    "three": [(5, True, False), (0, False, False), (1, True, True)],
    "three-alike": [(4, False, False)] * 3,
    "three-frozen": [(0, False, False)] * 3,
}
SOURCES = ("plain", "normed", "offset", "gated")


@dataclass
class Problem:
    """A group and what it reads; ``leaves`` are what a gradient is asked for, in the order of ``names``."""

    group: Group
    source: Source
    inputs: list[Tensor]
    residual: Tensor | None
    leaves: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        low_rank = [t for p in self.group.projections for t in (p.a, p.b) if t is not None]
        self.leaves = [*self.inputs, *([] if self.residual is None else [self.residual]), *low_rank]
        for leaf in self.leaves:
            leaf.requires_grad_()

    def ours(self, *, keep: bool = False) -> tuple[Tensor, ...]:
        return project(self.group, *self.inputs, source=self.source, residual=self.residual, keep=keep)

    def plainly(self) -> tuple[Tensor, ...]:
        """W x + b + s B A drop(x), as one writes it; low-rank masters are cast to the dtype of x."""
        x = _source(self.source, self.inputs)
        low = x
        if self.group.keys is not None:
            kept = lanes(self.group.keys, SITE, x.shape[1]) >= round(DROPPED * 65536)
            low = x * kept / (1 - DROPPED)
        outputs = [_plain_projection(p, x, low) for p in self.group.projections]
        return tuple(y if self.residual is None else y + self.residual for y in outputs)

    def to(self, dtype: torch.dtype) -> Problem:
        """The same numbers in another dtype, the low-rank masters in float32 at least."""

        group = replace(self.group, projections=tuple(_cast_all(p, dtype) for p in self.group.projections))
        source = self.source
        if isinstance(source, Normed):
            source = replace(source, weight=_cast(source.weight, dtype))
        inputs = [t.detach().to(dtype) for t in self.inputs]
        return Problem(group, source, inputs, _cast(self.residual, dtype))


def _cast_all(p: Projection, dtype: torch.dtype) -> Projection:
    wide = torch.promote_types(dtype, torch.float32)
    assert isinstance(p.weight, FrozenLinear)
    weight = FrozenLinear(p.weight.weight.to(dtype), p.weight.transposed)
    return Projection(weight, _cast(p.bias, dtype), _cast(p.a, wide), _cast(p.b, wide), p.scale)


def _cast(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if t is None else t.detach().to(dtype)


def _source(source: Source, inputs: Sequence[Tensor]) -> Tensor:
    if isinstance(source, Normed):
        assert source.weight is not None
        return F.rms_norm(inputs[0], inputs[0].shape[1:], source.offset + source.weight, source.eps)
    return F.silu(inputs[0]) * inputs[1] if isinstance(source, Gated) else inputs[0]


def _plain_projection(p: Projection, x: Tensor, low: Tensor) -> Tensor:
    assert isinstance(p.weight, FrozenLinear)
    y = F.linear(x, p.weight.dense(), p.bias)
    if p.a is None or p.b is None:
        return y
    return y + F.linear(F.linear(low, p.a.to(x.dtype)), p.b.to(x.dtype)) * p.scale


def problem(
    group: str, source: str = "plain", *, dropout: bool = False, residual: bool = False, n: int = 4, width: int = 6
) -> Problem:
    """In float64; every projection has an output of a size of its own."""
    draw = torch.Generator().manual_seed(n * 100 + width)

    def values(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    projections = []
    for i, (rank, has_bias, transposed) in enumerate(GROUPS[group]):
        out = width + 1 + i
        weight = values(width, out) if transposed else values(out, width)
        low_rank = (values(rank, width), values(out, rank), 0.6 + i) if rank else (None, None, 1.0)
        frozen = FrozenLinear(weight / width**0.5, transposed)
        projections.append(Projection(frozen, values(out) if has_bias else None, *low_rank))
    kinds: dict[str, Source] = {
        "plain": PLAIN,
        "normed": Normed(values(width), EPS),
        "offset": Normed(values(width), EPS, 1.0),
        "gated": Gated("silu"),
    }
    keys = torch.randint(1 << 62, (n,), generator=draw) if dropout else None
    inputs = [values(n, width) for _ in range(2 if source == "gated" else 1)]
    return Problem(
        Group(tuple(projections), DROPPED if dropout else 0.0, keys, SITE),
        kinds[source],
        inputs,
        values(n, width + 1) if residual else None,
    )


def weights_of(outputs: Sequence[Tensor]) -> list[Tensor]:
    """A gradient for each output."""
    draw = torch.Generator().manual_seed(9)
    return [torch.randn(y.shape, generator=draw, dtype=torch.float64).to(y.dtype) for y in outputs]


def with_gradients(outputs: Sequence[Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, weights_of(outputs))]
