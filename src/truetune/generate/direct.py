"""A decoder of the common build, computed from its parts on pages: none of the modules between its products runs.

    x + O(attention(rotate(Q n), rotate(K n), V n)),  n = norm(x);   then   x + D(act(G m) · U m),  m = norm(x)

Which layers are of this build a survey finds out by trying them; that the whole gives the model's logits is tried here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from truetune.generate.native import NativeDecoder
from truetune.generate.rows import Piece, spans_of
from truetune.generate.runner import PagedRunner, paged_row
from truetune.generate.terms import Span, project_rows, terms_at
from truetune.models.attention import AttentionSettings
from truetune.models.families import DecoderParts
from truetune.models.layers import decoder_layers
from truetune.models.paged import PAGE, PagedRow, Pages
from truetune.models.survey import survey
from truetune.ops import paged
from truetune.ops.attention import turned
from truetune.ops.frozen import FrozenWeight, frozen_weight, has_plain_products
from truetune.ops.gated import gated
from truetune.ops.loss import Head
from truetune.ops.paged import Segment

_MISFITS = (ValueError, TypeError, RuntimeError, AttributeError, IndexError, KeyError)


@dataclass(frozen=True)
class Map:
    """One frozen product."""

    weight: FrozenWeight
    bias: Tensor | None
    path: str

    def __call__(self, x: Tensor, spans: Sequence[Span]) -> Tensor:
        """[n, in] -> [n, out]."""
        return project_rows(self.weight, self.bias, x, terms_at(self.path, spans))


@dataclass(frozen=True)
class Layer:
    """One layer's parts."""

    parts: DecoderParts
    settings: AttentionSettings
    q: Map
    k: Map
    v: Map
    o: Map
    gate: Map
    up: Map
    down: Map

    def forward(self, x: Tensor, number: int, row: PagedRow, spans: Sequence[Span], cos: Tensor, sin: Tensor) -> Tensor:
        """[n, hidden] -> [n, hidden]; keys and values of the new tokens go into the pages."""
        parts, count = self.parts, len(x)
        normed = parts.input_norm.forward(x)[0]
        q, k, v = (m(normed, spans).view(count, -1, parts.head_dim) for m in (self.q, self.k, self.v))
        q = turned(parts.q_norm(q) if parts.q_norm else q, cos, sin)
        k = turned(parts.k_norm(k) if parts.k_norm else k, cos, sin)
        keys, values = row.pages.layer(number, k, v)
        paged.write(keys, values, k, v, row.rows)
        settings = self.settings
        mixed = paged.attend(
            q, keys, values, row.segments, scale=settings.scale, window=settings.window, softcap=settings.softcap
        )
        x = x + self.o(mixed.flatten(1), spans)
        normed = parts.mlp_norm.forward(x)[0]
        inner = gated(self.gate(normed, spans), self.up(normed, spans), parts.activation)
        return x + self.down(inner, spans)


class DirectRunner:
    """Computes pieces from the parts of the layers.

    Args:
        own: runs the model's own code, on the same pages.
    """

    def __init__(self, own: PagedRunner, layers: Sequence[Layer], head: Head) -> None:
        self.own, self.model, self.pages = own, own.model, own.pages
        self.layers, self.head = tuple(layers), head
        core = self.model.base_model
        self.table, self.norm, self._rotary = core.get_input_embeddings(), core.norm, core.rotary_emb
        self._angles = (torch.empty(0), torch.empty(0))
        self._native: NativeDecoder | None = None

    @classmethod
    def of(cls, own: PagedRunner) -> Self | None:
        """For a model that it computes rightly; None for any other."""
        found = survey(own.model)
        layers = decoder_layers(own.model)
        if found.head is None or not layers or not all(layer in found.fusable for layer in layers):
            return None
        paths = {id(module): path for path, module in own.model.named_modules()}
        made = [_layer(*found.fusable[layer], paths) for layer in layers]
        whole = [layer for layer in made if layer is not None]
        try:
            runner = cls(own, whole, found.head)
            if len(whole) < len(layers) or not runner._is_right():
                return None
            runner._native = NativeDecoder.of(runner, own.pages)
        except _MISFITS:
            return None
        return runner

    def logits(self, pieces: Sequence[Piece]) -> Tensor:
        """[w, vocab]: what follows each piece that ends its row so far, in their order."""
        found: dict[int, Tensor] = {}
        # Apart, so that a row's token comes out the same whether or not a prompt is computed beside it.
        for together in ([p for p in pieces if p.count == 1], [p for p in pieces if p.count > 1]):
            ending = [id(piece) for piece in together if piece.ends]
            if together:
                found |= dict(zip(ending, self._together(together).float(), strict=True))
        return torch.stack([found[id(piece)] for piece in pieces if piece.ends]) if found else torch.empty(0)

    def _together(self, pieces: Sequence[Piece]) -> Tensor:
        ids, row, wanted = paged_row(pieces, self.pages, self.model.device)
        spans = spans_of(pieces)
        if self._native is not None and len(ids) == len(pieces) and (library := self._native.takes(spans)):
            return self._native.logits(library, ids, row, spans)[wanted]
        return self._compute(ids, row, wanted, spans)

    def _compute(self, ids: Tensor, row: PagedRow, wanted: Tensor, spans: Sequence[Span]) -> Tensor:
        x: Tensor = self.table(ids)
        cos, sin = self.angles(row.positions, x)
        for number, layer in enumerate(self.layers):
            x = layer.forward(x, number, row, spans, cos, sin)
        return self.head.logits(self.norm(x[wanted]))

    def angles(self, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """[n, rotary] each: cosine and sine of some positions, from the model's own table."""
        longest = int(positions.max()) + 1
        if longest > len(self._angles[0]):
            size = 1 << max(longest, 256).bit_length()
            cos, sin = self._rotary(like[None], torch.arange(size, device=like.device)[None])
            self._angles = cos[0].contiguous(), sin[0].contiguous()
        cos, sin = self._angles
        positions = positions.to(cos.device)
        return cos[positions], sin[positions]

    def _is_right(self) -> bool:
        """Whether a few tokens come out as the model's own code has them."""
        model, vocab = self.model, len(self.table.weight)
        ids = ((torch.arange(PAGE + 3) * 5 + 1) % vocab).to(model.device)
        step = PagedRow.of([Segment(0, len(ids), torch.tensor([1, 0]))], Pages(2))
        with torch.no_grad():
            expected = model(input_ids=ids[None], use_cache=False).logits[0].float()
            found = self._compute(ids, step, torch.arange(len(ids), device=model.device), ()).float()
        allowed = 1e-4 if model.dtype == torch.float32 else 4e-2
        return bool(((found - expected).norm(dim=-1) <= allowed * expected.norm(dim=-1)).all())


def _layer(parts: DecoderParts, settings: AttentionSettings, paths: dict[int, str]) -> Layer | None:
    def made(module: nn.Module) -> Map:
        bias: Any = module.bias
        return Map(frozen_weight(module), bias, paths[id(module)])

    modules = (parts.q, parts.k, parts.v, parts.o, parts.gate, parts.up, parts.down)
    if not all(has_plain_products(module) for module in modules):
        return None
    return Layer(parts, settings, *map(made, modules))
