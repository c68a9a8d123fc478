"""The hook into transformers' attention: packed rows run segment by segment, and no mask is ever built.

Registered under one name through the library's own extension point. A packed batch brings the borders of its segments
as ``cu_seq_lens_q``, the keyword that models pass down for variable-length kernels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from truetune.ops.attention import segment_attention

NAME = "truetune"


@dataclass(frozen=True)
class AttentionSettings:
    """How a layer calls its attention."""

    scale: float | None
    window: int | None
    softcap: float | None
    dropout: float


@dataclass
class Witness:
    """What a model asks of its attention while it is tried."""

    windows_in_masks: set[int] = field(default_factory=set)
    calls: dict[nn.Module, AttentionSettings] = field(default_factory=dict)


@dataclass(frozen=True)
class PackedRow:
    """The row that is being computed.

    The lengths are known here: read from the borders, they would make every layer wait for the device.
    """

    lengths: tuple[int, ...]
    columns: Tensor | None = None  # [c] int64: the tokens whose last hidden state is wanted; None for all


row: ContextVar[PackedRow | None] = ContextVar("row", default=None)
witness: ContextVar[Witness | None] = ContextVar("witness", default=None)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Segments when the batch is packed, else transformers' own SDPA."""
    borders = kwargs.get("cu_seq_lens_q")
    if borders is None:
        plain: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return plain
    asked = AttentionSettings(
        kwargs.get("scaling"), kwargs.get("sliding_window"), kwargs.get("softcap"), kwargs.get("dropout") or 0.0
    )
    if seen := witness.get():
        seen.calls[module] = asked
    packed = row.get()
    out = segment_attention(
        query, key, value, packed.lengths if packed else borders.diff().tolist(),
        scale=asked.scale, window=asked.window, softcap=asked.softcap, dropout=asked.dropout,
    )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None


def _mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """No mask without padding: the segments say it all, once the model hands the attention its window as well."""
    if kwargs.get("local_size") is not None and (seen := witness.get()):
        seen.windows_in_masks.add(kwargs["local_size"])
    return None if attention_mask is None else sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)


@contextlib.contextmanager
def segmented(model: PreTrainedModel, name: str = NAME) -> Iterator[None]:
    """Run ``model`` with this attention, or another that is registered, and give its own back afterwards."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextlib.contextmanager
def set_to(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    """A context variable's value inside a block."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def borders(lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
    """The keywords that carry the segments of a packed row through a model."""
    edges = torch.tensor([0, *lengths]).cumsum(0).to(device=device, dtype=torch.int32)
    longest = max(lengths)
    return {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "max_length_q": longest, "max_length_k": longest}
