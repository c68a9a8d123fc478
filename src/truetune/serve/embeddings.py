"""Embeddings: the mean of the last hidden states over a text's tokens.

A decoder that was trained to write makes middling embeddings; they are as good as its hidden states.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from truetune.generate.engine import Engine
from truetune.generate.runner import beside
from truetune.generate.terms import Span
from truetune.serve.refusal import Refusal


def embed(engine: Engine, texts: Sequence[Sequence[int]], *, adapter: str | None) -> list[Tensor]:
    """[hidden] float32 for each text, unscaled; an adapter's virtual tokens are read and not averaged.

    Raises:
        Refusal: a text that is empty or too long, an id that the model lacks, or a model with no hidden states.
        AdapterError: the adapter can't be loaded any more.
    """
    vocabulary = engine.model.get_input_embeddings().weight.shape[0]
    room = min((n for n in (engine.context, engine.stats()["kv_capacity"]) if n is not None), default=None)
    for number, ids in enumerate(texts):
        if not ids:
            raise Refusal(400, f"input {number}: there is no token in it", param="input")
        if room is not None and len(ids) > room:
            what = "the model's context" if room == engine.context else "the server's --max-tokens"
            said = f"input {number}: {len(ids):,} tokens, and {what} is {room:,}"
            raise Refusal(400, said, param="input", code="context_length_exceeded")
        if not all(0 <= i < vocabulary for i in ids):
            raise Refusal(400, f"input {number}: an id beyond the vocabulary's {vocabulary - 1}", param="input")
    return [_mean(engine, ids, adapter) for ids in texts]  # the lock is free in between: answers go on


def encoded(vector: Tensor, form: str | None) -> list[float] | str:
    """As the wire has it."""
    if form == "base64":
        return base64.b64encode(vector.cpu().numpy().astype("<f4").tobytes()).decode()
    found: list[float] = vector.tolist()
    return found


@torch.no_grad()
def _mean(engine: Engine, ids: Sequence[int], adapter: str | None) -> Tensor:
    model = engine.model
    with engine.lock:
        loaded = engine.adapters.get(adapter) if adapter is not None else None
        terms = (loaded.terms if loaded else None) or {}
        virtual = loaded.virtual_ids if loaded else ()
        whole = torch.tensor([[*virtual, *ids]], device=model.device)
        if loaded is None or loaded.terms is not None:
            with beside(model, [Span(0, whole.shape[1], terms)] if terms else []):
                states = _states(model, whole)
        else:
            with loaded.mounted(model):
                states = _states(model, whole)
    vector = states[0, len(virtual) :].float().mean(0)
    if not bool(torch.isfinite(vector).all()):
        raise Refusal(500, "the model's hidden states are not finite", kind="server_error")
    return vector


def _states(model: Any, ids: Tensor) -> Tensor:
    """[1, n, hidden], behind the last norm."""
    out = model.base_model(input_ids=ids, use_cache=False)
    states = getattr(out, "last_hidden_state", None)
    if not isinstance(states, Tensor):
        raise Refusal(400, "this model gives no hidden states to average", param="model")
    return states
