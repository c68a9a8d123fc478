"""The hook into transformers' attention for serving: many texts in one row, their keys and values kept in pages.

Registered under one name through the library's extension point, as the one for training is. The model's own code runs
as it is, without a cache of its own and without a mask: what a token sees is said by the pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from truetune.models.attention import borders, segmented, set_to
from truetune.models.survey import survey
from truetune.ops import paged
from truetune.ops.paged import Segment

NAME = "truetune-paged"
PAGE = 16
"""Tokens of a page."""

# Rotations that depend on the longest text of a batch: a text would change with its neighbours.
_MOVING_ROPE = ("dynamic", "longrope")


@dataclass
class Pages:
    """The keys and values of all texts, layer by layer; a layer's come to be when it is first computed."""

    count: int
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)

    def layer(self, number: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The pages [count, PAGE, kv_heads, d] of a layer, shaped for keys and values [n, kv_heads, d]."""
        if number not in self.keys:
            self.keys[number] = k.new_zeros(self.count, PAGE, *k.shape[1:])
            self.values[number] = v.new_zeros(self.count, PAGE, *v.shape[1:])
        return self.keys[number], self.values[number]

    @property
    def nbytes(self) -> int:
        """What all layers' pages take."""
        return sum(t.nbytes for held in (self.keys, self.values) for t in held.values())


@dataclass(frozen=True)
class PagedRow:
    """The row that is being computed: whose tokens it holds, and where they go."""

    segments: tuple[Segment, ...]
    pages: Pages
    rows: Tensor  # as ops.paged.places gives them

    @classmethod
    def of(cls, segments: Sequence[Segment], pages: Pages) -> PagedRow:
        """A row of these segments, one after the other."""
        return cls(tuple(segments), pages, paged.places(segments, PAGE))

    @property
    def positions(self) -> Tensor:
        """[n] int64: each new token's place in its text."""
        return torch.cat([torch.arange(s.start, s.end) for s in self.segments])


row: ContextVar[PagedRow | None] = ContextVar("paged_row", default=None)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Keys and values into the pages, and each token over its own text."""
    step = row.get()
    number = getattr(module, "layer_idx", None)
    if step is None or not isinstance(number, int) or attention_mask is not None:
        raise ValueError("no pages for this attention")
    if own := {k for k, v in kwargs.items() if v is not None} & {"s_aux", "sinks", "position_bias", "head_mask"}:
        raise ValueError(f"an attention with {sorted(own)}")
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    keys, values = step.pages.layer(number, k, v)
    paged.write(keys, values, k, v, step.rows)
    mixed = paged.attend(
        q, keys, values, step.segments,
        scale=kwargs.get("scaling"), window=kwargs.get("sliding_window"), softcap=kwargs.get("softcap"),
    )  # fmt: skip
    return mixed[None], None


def _mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    return None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)


def on_pages(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Run ``model`` with this attention, and give its own back afterwards."""
    return segmented(model, NAME)


def paged_logits(model: PreTrainedModel, ids: Tensor, step: PagedRow, wanted: Tensor) -> Tensor:
    """[w, vocab]: the logits of the wanted tokens of a row, with the attention of ``on_pages`` in force.

    Args:
        ids: [n] int64, the new tokens of the row's segments.
        wanted: [w] int64, which of them.
    """
    lengths = [segment.count for segment in step.segments]
    with set_to(row, step):
        out = model(
            input_ids=ids[None], position_ids=step.positions[None].to(ids.device), use_cache=False,
            logits_to_keep=wanted, **borders(lengths, ids.device),
        )  # fmt: skip
    logits: Tensor = out.logits[0]
    return logits


def takes_pages(model: PreTrainedModel) -> bool:
    """Whether a model gives the same logits from pages as alone, found out by trying a few tokens.

    A model whose texts can't share a row, or that rotates by the longest text there is, has to run text by text.
    """
    if _rope_kind(model.config) in _MOVING_ROPE or not survey(model).packs:
        return False
    vocab = model.get_input_embeddings().weight.shape[0]
    texts = [((torch.arange(size) * (2 * i + 3) + i) % vocab).to(model.device) for i, size in enumerate((PAGE + 5, 7))]
    try:
        with torch.no_grad():
            alone = [model(input_ids=text[None], use_cache=False).logits[0] for text in texts]
            found = _in_pieces(model, texts)
    except (ValueError, TypeError, RuntimeError, AttributeError, IndexError, KeyError):
        return False
    return all(_close(a, b) for a, b in zip(found, alone, strict=True))


def _in_pieces(model: PreTrainedModel, texts: Sequence[Tensor]) -> list[Tensor]:
    """[size, vocab] each: the logits of the texts, computed together and in three pieces."""
    pages = Pages(4)
    held, parts = (torch.tensor([2, 0]), torch.tensor([3])), [list[Tensor]() for _ in texts]
    with on_pages(model):
        for piece in range(3):
            cuts = [(len(t) * piece // 3, len(t) * (piece + 1) // 3) for t in texts]
            step = PagedRow.of([Segment(a, b - a, h) for (a, b), h in zip(cuts, held, strict=True)], pages)
            ids = torch.cat([t[a:b] for t, (a, b) in zip(texts, cuts, strict=True)])
            logits = paged_logits(model, ids, step, torch.arange(len(ids), device=ids.device))
            for part, own in zip(parts, torch.split(logits, [b - a for a, b in cuts]), strict=True):
                part.append(own)
    return [torch.cat(part) for part in parts]


def _close(found: Tensor, expected: Tensor) -> bool:
    low = expected.dtype != torch.float32
    error = (found.float() - expected.float()).norm(dim=-1)
    return bool((error <= (4e-2 if low else 1e-4) * expected.float().norm(dim=-1)).all())


def _rope_kind(config: Any) -> str | None:
    text = config.get_text_config()
    for name in ("rope_parameters", "rope_scaling"):
        found = getattr(text, name, None)
        if isinstance(found, dict):
            kinds = [found.get("rope_type") or found.get("type")]
            kinds += [v.get("rope_type") for v in found.values() if isinstance(v, dict)]
            for kind in kinds:
                if kind in _MOVING_ROPE:
                    return str(kind)
    return None
