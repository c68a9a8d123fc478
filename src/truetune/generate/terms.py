"""Adapters row by row: one product with the frozen weight for all rows, and what each adapter adds to its own.

    y = o ∘ (g ∘ (W (i ∘ x) + s B A x) + b + c)

LoRA and AdaLoRA bring s B A, DoRA the factor g, a trained bias c, IA3 the factor i or o. What an adapter does not have
is left out, so rows of the base pay for no product but the first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from truetune.adapters.base import Adapter
from truetune.adapters.ia3 import IA3Linear, scaled
from truetune.adapters.prefix_linear import PrefixLinear
from truetune.adapters.projecting import Projecting
from truetune.ops.frozen import FrozenWeight, has_plain_products


@dataclass(frozen=True)
class Term:
    """What one adapter does at one linear map; all in the dtype of the map's products but for the factors (float32)."""

    a: Tensor | None = None  # [r, in]
    b: Tensor | None = None  # [r, out], transposed, with the scale in it
    magnitude: Tensor | None = None  # g, [out]
    shift: Tensor | None = None  # c, [out]
    of_input: Tensor | None = None  # i, [in]
    of_output: Tensor | None = None  # o, [out]

    @property
    def nbytes(self) -> int:
        """The memory of its tensors."""
        tensors = (self.a, self.b, self.magnitude, self.shift, self.of_input, self.of_output)
        return sum(t.nbytes for t in tensors if t is not None)


@dataclass(frozen=True)
class Span:
    """Rows ``first`` … ``end - 1``, which one adapter adds to; by the path of each map it stands beside."""

    first: int
    end: int
    terms: Mapping[str, Term]


def term_of(adapter: Adapter) -> Term | None:
    """What a wrapped layer does, as a term; None where it is none."""
    if not has_plain_products(adapter.base) or isinstance(adapter, PrefixLinear):
        return None
    if isinstance(adapter, IA3Linear):
        factors = adapter.factors.detach().flatten().float().contiguous()
        return Term(of_input=factors) if adapter.scales_input else Term(of_output=factors)
    projection = cast(Projecting, adapter).projection() if hasattr(adapter, "projection") else None
    if projection is None:
        return None
    dtype = projection.weight.dtype

    def kept(tensor: Tensor | None, kind: torch.dtype) -> Tensor | None:
        return None if tensor is None else tensor.detach().to(kind).clone(memory_format=torch.contiguous_format)

    b = None if projection.b is None else (projection.b * projection.scale).T
    return Term(
        kept(projection.a, dtype),
        kept(b, dtype),
        kept(projection.magnitude, torch.float32),
        kept(projection.shift, dtype),
    )


def terms_of(modules: Mapping[str, Adapter]) -> dict[str, Term] | None:
    """Path → term of all wrapped layers; None where one of them is no term."""
    found = {path: term_of(adapter) for path, adapter in modules.items()}
    terms = {path: term for path, term in found.items() if term is not None}
    return terms if len(terms) == len(found) else None


def project_rows(weight: FrozenWeight, bias: Tensor | None, x: Tensor, own: Sequence[tuple[int, int, Term]]) -> Tensor:
    """See the module.

    Args:
        x: [n, in].
        own: ``(first row, end, term)``, apart from each other.
    Returns:
        A new [n, out].
    """
    given = x
    if any(term.of_input is not None for _, _, term in own):
        given = x.clone()
        for first, end, term in own:
            if term.of_input is not None:
                given[first:end] = scaled(x[first:end], term.of_input)
    bare = any(term.magnitude is not None for _, _, term in own)
    y = weight.matmul(given, None if bare else bias)
    for first, end, term in own:
        if term.a is not None and term.b is not None:
            y[first:end].addmm_(given[first:end] @ term.a.T, term.b)
        if term.magnitude is not None:
            y[first:end] = scaled(y[first:end], term.magnitude)
    if bare and bias is not None:
        y += bias
    for first, end, term in own:
        if term.shift is not None:
            y[first:end] += term.shift
        if term.of_output is not None:
            y[first:end] = scaled(y[first:end], term.of_output)
    return y


def terms_at(path: str, spans: Sequence[Span]) -> list[tuple[int, int, Term]]:
    """Those of one map."""
    return [(span.first, span.end, span.terms[path]) for span in spans if path in span.terms]
