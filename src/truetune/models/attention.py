"""The hook into transformers' attention: packed rows run segment by segment, and no mask is ever built.

Registered under one name through the library's own extension point. A packed batch brings the borders of its segments
as ``cu_seq_lens_q``, the keyword that models pass down for variable-length kernels.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from truetune.data.pack import Batch
from truetune.models.load import quiet
from truetune.ops.attention import segment_attention

NAME = "truetune"
_SIZE_STEP = 64
_PROBED_WINDOW = 512  # beyond this, a text longer than the window costs more to try than it could still show


@dataclass
class _Windows:
    """What a model limits its attention to, as this module gets to know of it."""

    in_masks: set[int] = field(default_factory=set)
    in_calls: set[int] = field(default_factory=set)


# The lengths of the row that is being computed: read from the borders, they would make every layer wait for the device.
_lengths: ContextVar[tuple[int, ...] | None] = ContextVar("lengths", default=None)
_seen: ContextVar[_Windows | None] = ContextVar("seen", default=None)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Segments when the batch is packed, else transformers' own SDPA."""
    borders = kwargs.get("cu_seq_lens_q")
    if borders is None:
        plain: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return plain
    window = kwargs.get("sliding_window")
    if window is not None and (seen := _seen.get()):
        seen.in_calls.add(window)
    out = segment_attention(
        query,
        key,
        value,
        _lengths.get() or borders.diff().tolist(),
        scale=kwargs.get("scaling"),
        window=window,
        softcap=kwargs.get("softcap"),
        dropout=kwargs.get("dropout") or 0.0,
    )
    return out.transpose(1, 2).contiguous(), None


def _mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """No mask without padding: the segments say it all, once the model hands the attention its window as well."""
    if kwargs.get("local_size") is not None and (seen := _seen.get()):
        seen.in_masks.add(kwargs["local_size"])
    return None if attention_mask is None else sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)


@contextlib.contextmanager
def segmented(model: PreTrainedModel) -> Iterator[None]:
    """Run ``model`` with this attention, and give its own back afterwards."""
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def supports_segments(model: PreTrainedModel, *, longest: int | None = None) -> bool:
    """Whether packed segments stay apart in this model: tried on the model itself, with a few tokens.

    Two short texts are run packed, and alone through the model's own attention. A model that ignores the borders, mixes
    tokens by other means, or has an attention of its own kind gives other logits, and is trained with padding instead.
    So is one that puts a window or chunks into its masks alone, where segments would lose them.

    Args:
        longest: tokens of the longest example. A window that no example exceeds does not matter; every window does when
            this is not known.
    """
    vocab = model.get_input_embeddings().weight.shape[0]
    windows = {window for window in _windows_of(model.config) if longest is None or window < longest}
    beyond = [min(window + 3, longest or window + 3) for window in windows if window <= _PROBED_WINDOW]
    sizes = (5, max([7, *beyond]))
    texts = [(torch.arange(size) * (2 * i + 1) + i) % vocab for i, size in enumerate(sizes)]
    was_training, seen = model.training, _Windows()
    model.eval()
    try:
        with torch.no_grad(), quiet():
            alone = torch.cat(
                [model(input_ids=text[None].to(model.device), use_cache=False).logits[0] for text in texts]
            )
            with segmented(model), _set(_seen, seen):
                packed = _run(model, texts)
    except (ValueError, TypeError, RuntimeError, AttributeError, IndexError):
        return False
    finally:
        model.train(was_training)
    windows |= {window for window in seen.in_masks if longest is None or window < longest}
    if not windows <= seen.in_calls:
        return False
    spread = alone.float().std()
    tolerance = 1e-4 if alone.dtype == torch.float32 else 5e-2
    return bool(((alone - packed).float().abs().max() / spread) < tolerance)


def _windows_of(config: Any) -> set[int]:
    """The sizes of the windows and chunks that a config sets, for the layers that it gives them to."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    slides = getattr(text, "use_sliding_window", True) is not False and (not kinds or "sliding_attention" in kinds)
    is_chunked = not kinds or "chunked_attention" in kinds
    sizes = {
        getattr(text, "sliding_window", None) if slides else None,
        getattr(text, "attention_chunk_size", None) if is_chunked else None,
    }
    return {size for size in sizes if isinstance(size, int) and size > 0}


@contextlib.contextmanager
def _set(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def _run(model: PreTrainedModel, texts: list[Tensor]) -> Tensor:
    ids = torch.cat(texts)[None].to(model.device)
    positions = torch.cat([torch.arange(len(text)) for text in texts])[None].to(model.device)
    logits: Tensor = model(
        input_ids=ids, position_ids=positions, use_cache=False, **borders([len(text) for text in texts], model.device)
    ).logits[0]
    return logits


def borders(lengths: list[int] | tuple[int, ...], device: torch.device) -> dict[str, Any]:
    """The keywords that carry the segments of a packed row through a model."""
    edges = torch.tensor([0, *lengths]).cumsum(0).to(device=device, dtype=torch.int32)
    longest = max(lengths)
    return {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "max_length_q": longest, "max_length_k": longest}


def trained_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """[n, vocab]: the logits at the positions that predict a trained token, and at no other."""
    return _packed_logits(model, batch) if batch.lengths is not None else _padded_logits(model, batch)


def _packed_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    assert batch.lengths is not None
    ids, positions, lengths, columns = batch.input_ids, batch.position_ids, batch.lengths, batch.columns
    if spare := _spare(model, ids.shape[1]):
        filler = torch.arange(spare)[None]
        ids, positions = torch.cat([ids, filler * 0], dim=1), torch.cat([positions, filler], dim=1)
        lengths = (*lengths, spare)
    if spare := _spare(model, len(columns)):
        columns = torch.cat([columns, columns.new_zeros(spare)])
    with _set(_lengths, tuple(lengths)):
        logits = _call(model, ids, columns, position_ids=positions.to(model.device), **borders(lengths, model.device))
    # There is one row, and its columns are exactly what is wanted: a gather would only cost a scatter backwards.
    return logits[0, : len(batch.columns)]


def _padded_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    assert batch.attention_mask is not None
    # Right padding: attention is causal, so real tokens never see it; positions need no help either.
    inputs = {
        "position_ids": batch.position_ids.to(model.device),
        "attention_mask": batch.attention_mask.to(model.device),
    }
    return _call(model, batch.input_ids, batch.columns, **inputs).flatten(0, 1)[batch.picks.to(model.device)]


def _call(model: PreTrainedModel, ids: Tensor, columns: Tensor, **inputs: Any) -> Tensor:
    """[B, c, vocab]: the logits of these columns."""
    columns = columns.to(model.device)
    keeps = "logits_to_keep" in inspect.signature(type(model).forward).parameters
    if keeps:
        inputs["logits_to_keep"] = columns
    logits: Tensor = model(input_ids=ids.to(model.device), use_cache=False, **inputs).logits
    return logits if keeps else logits[:, columns]


def _spare(model: PreTrainedModel, size: int) -> int:
    """How many places to add so that low-precision products on a CPU come in few sizes.

    oneDNN compiles a kernel for every size it meets, which took longer than the product itself: 3 to 13 ms against 1.
    The added tokens are a segment of their own and nothing reads them.
    """
    low = model.dtype != torch.float32 or torch.is_autocast_enabled("cpu")
    return -size % _SIZE_STEP if low and model.device.type == "cpu" else 0
