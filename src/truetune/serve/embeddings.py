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
from truetune.generate.loaded import LoadedAdapter
from truetune.generate.runner import beside
from truetune.generate.terms import Span
from truetune.serve.refusal import Refusal


def check(engine: Engine, texts: Sequence[Sequence[int]]) -> None:
    """Raises Refusal: a text that is empty or too long, more than fits in all, or an id that the model lacks."""
    vocabulary = engine.model.get_input_embeddings().weight.shape[0]
    room = min((n for n in (engine.context, engine.capacity) if n is not None), default=None)
    for number, ids in enumerate(texts):
        if not ids:
            raise Refusal(400, f"input {number}: there is no token in it", param="input")
        if room is not None and len(ids) > room:
            what = "the model's context" if room == engine.context else "the server's --max-tokens"
            said = f"input {number}: {len(ids):,} tokens, and {what} is {room:,}"
            raise Refusal(400, said, param="input", code="context_length_exceeded")
        if not all(0 <= i < vocabulary for i in ids):
            raise Refusal(400, f"input {number}: an id beyond the vocabulary's {vocabulary - 1}", param="input")
    if engine.capacity is not None and (count := sum(map(len, texts))) > engine.capacity:
        said = f"input: {count:,} tokens in all, and the server's --max-tokens is {engine.capacity:,}"
        raise Refusal(400, said, param="input")


def encoded(vector: Tensor, form: str | None) -> list[float] | str:
    """As the wire has it."""
    if form == "base64":
        return base64.b64encode(vector.cpu().numpy().astype("<f4").tobytes()).decode()
    found: list[float] = vector.tolist()
    return found


@torch.no_grad()
def mean_state(engine: Engine, ids: Sequence[int], loaded: LoadedAdapter | None) -> Tensor:
    """[hidden] float32 of one text, unscaled; an adapter's virtual tokens are read and not averaged.

    The engine's lock is held for one text alone: between two of them answers go on.

    Raises:
        Refusal: a model with no hidden states.
    """
    model = engine.model
    with engine.lock:
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
