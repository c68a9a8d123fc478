"""The C kernels' side of ``direct``: steps of one token a row, with every weight read once for all rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from typing_extensions import Self

from truetune.generate.terms import Span, Term
from truetune.models.families import normed
from truetune.models.paged import PagedRow, Pages
from truetune.ops import dispatch
from truetune.ops.frozen import FrozenLinear
from truetune.ops.native.decode import MAPS, MOST_RANK, LayerParts, Layers, NormPart, RowTerm, skinny
from truetune.ops.native.library import Library
from truetune.ops.source import Normed

if TYPE_CHECKING:
    from truetune.generate.direct import DirectRunner, Layer


class NativeDecoder:
    """Computes the steps of a ``DirectRunner`` in which each row has one token."""

    def __init__(self, runner: DirectRunner, layers: Layers) -> None:
        self._runner, self._layers = runner, layers
        self._norm = normed(runner.norm)
        self._placed: tuple[tuple[int, int, int], ...] | None = ()  # None: unknown
        self._held: tuple[Mapping[str, Term], ...] = ()

    @classmethod
    def of(cls, runner: DirectRunner, pages: Pages) -> Self | None:
        """For dense weights of one dtype on a CPU with the native kernels; else None."""
        first = runner.layers[0]
        weight = first.q.weight
        if not isinstance(weight, FrozenLinear) or dispatch.native(weight.weight) is None:
            return None
        parts = [_parts(layer, number, pages, weight.dtype) for number, layer in enumerate(runner.layers)]
        whole = [part for part in parts if part is not None]
        shapes = {tuple(w.shape for w, _ in part.maps.values()) for part in whole}
        if len(whole) < len(parts) or len(shapes) > 1 or len({layer.parts.activation for layer in runner.layers}) > 1:
            return None
        dim = first.parts.head_dim
        rotary = runner.angles(torch.zeros(1, dtype=torch.int64), weight.weight[:1])[0].shape[-1]
        return cls(
            runner, Layers(whole, heads=first.q.weight.out_features // dim, dim=dim, rotary=rotary,
                           kind=first.parts.activation)
        )  # fmt: skip

    def takes(self, spans: Sequence[Span]) -> Library | None:
        """The library, if it can compute with these adapters."""
        weight = self._layers.parts[0].maps["q"][0]
        terms = [term for span in spans for term in span.terms.values()]
        if any(term.a is not None and len(term.a) > MOST_RANK for term in terms):
            return None
        return dispatch.native(weight)

    def logits(self, library: Library, ids: Tensor, row: PagedRow, spans: Sequence[Span]) -> Tensor:
        """[n, vocab] float32: what follows each of n rows' one new token."""
        runner, positions = self._runner, row.positions
        x = runner.table(ids).float().contiguous()
        self._place(spans)
        cos, sin = (angle.float().contiguous() for angle in runner.angles(positions, runner.table(ids[:1])))
        self._layers.decode(library, x, (cos, sin), positions, [segment.pages for segment in row.segments])
        head = runner.head
        if head.weight is None or self._norm is None or not _is_plain(head.weight, head.bias):
            return head.logits(runner.norm(x.to(runner.model.dtype))).float()
        hidden = self._norm.forward(x)[0]
        scores = skinny(library, hidden, head.weight, head.bias)
        scores = scores * head.scale if head.scale != 1.0 else scores
        return head.softcap * torch.tanh(scores / head.softcap) if head.softcap else scores

    def _place(self, spans: Sequence[Span]) -> None:
        wanted = tuple((span.first, span.end, id(span.terms)) for span in spans)
        if wanted == self._placed:
            return
        beside: dict[tuple[int, str], list[RowTerm]] = {}
        for number, layer in enumerate(self._runner.layers):
            for name in MAPS:
                path = getattr(layer, name).path
                rows = [_row_term(span, span.terms[path]) for span in spans if path in span.terms]
                if rows:
                    beside[number, name] = rows
        self._placed = None
        self._layers.place(beside)
        # Held, so that no other adapter's terms can come to lie at the same address.
        self._placed, self._held = wanted, tuple(span.terms for span in spans)


def _row_term(span: Span, term: Term) -> RowTerm:
    return RowTerm(span.first, span.end, term.a, term.b, term.shift, term.magnitude, term.of_input, term.of_output)


def _parts(layer: Layer, number: int, pages: Pages, dtype: torch.dtype) -> LayerParts | None:
    maps = {}
    for name in MAPS:
        own = getattr(layer, name)
        weight = own.weight
        if not isinstance(weight, FrozenLinear) or weight.transposed or not _is_plain(weight.weight, own.bias):
            return None
        if weight.dtype != dtype:
            return None
        maps[name] = (weight.weight.detach(), None if own.bias is None else own.bias.detach())
    norms = {name: _norm(found, dtype) for name, found in _norms(layer).items()}
    if not all(norms.values()):
        return None
    settings, dim = layer.settings, layer.parts.head_dim
    like = torch.empty(0, layer.k.weight.out_features // dim, dim, dtype=dtype)
    keys, values = pages.layer(number, like, like)
    return LayerParts(
        maps, {name: norm for name, norm in norms.items() if norm is not None}, keys, values,
        dim**-0.5 if settings.scale is None else settings.scale, settings.softcap or 0.0, settings.window or 0,
    )  # fmt: skip


def _norms(layer: Layer) -> dict[str, Normed | None]:
    found: dict[str, Normed | None] = {"input": layer.parts.input_norm, "mlp": layer.parts.mlp_norm}
    heads: dict[str, nn.Module | None] = {"q": layer.parts.q_norm, "k": layer.parts.k_norm}
    return found | {name: normed(module) for name, module in heads.items() if module is not None}


def _norm(found: Normed | None, dtype: torch.dtype) -> NormPart | None:
    if found is None or found.weight is None or found.weight.dtype != dtype or not _is_plain(found.weight, None):
        return None
    return NormPart(found.weight.detach(), found.eps, found.offset)


def _is_plain(weight: Tensor, bias: Tensor | None) -> bool:
    """Whether C can read them where they are."""
    tensors = [weight] if bias is None else [weight, bias]
    return all(t.is_contiguous() and t.dtype == weight.dtype for t in tensors) and dispatch.native(*tensors) is not None
