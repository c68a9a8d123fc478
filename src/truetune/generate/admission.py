"""From a request to a row: what can be answered at all, and all that an answer needs from its first step on."""

from __future__ import annotations

from typing import Any

from truetune.adapters.virtual import virtual_ids
from truetune.errors import ConfigError
from truetune.generate.loaded import LoadedAdapter
from truetune.generate.request import Handle, Request
from truetune.generate.rows import Row
from truetune.generate.sample import Draws
from truetune.generate.shelf import AdapterShelf
from truetune.generate.text import TextStream
from truetune.models.load import context_length


class Admission:
    """Makes rows of requests. From any thread.

    Args:
        capacity: tokens whose keys and values can be kept; None for no limit.
    """

    def __init__(self, model: Any, tokenizer: Any, adapters: AdapterShelf, capacity: int | None) -> None:
        self._model, self._tokenizer, self._adapters = model, tokenizer, adapters
        self._capacity = capacity
        self._virtual = tuple(virtual_ids(model))  # of an adapter that the model itself carries
        self.context = context_length(model.config)

    def row(self, request: Request, handle: Handle) -> Row:
        """The row of a request, with its adapter as it is now: that is the one it ends with.

        Raises:
            ConfigError: an empty prompt, one that does not fit, or ids that the model lacks.
            AdapterError: an adapter that is not registered, or whose folder holds none that fits.
            AdapterChangedError: it is not the one that the request was made for.
        """
        self._check(request)
        adapter = None if request.adapter is None else self._adapters.get(request.adapter, stamp=request.stamp)
        ids = [*(adapter.virtual_ids if adapter else self._virtual), *request.prompt_ids]
        room = self._room_behind(ids, request, adapter)
        guide = None if request.grammar is None else request.grammar.guide()
        return Row(
            request, handle, TextStream(self._tokenizer.hf, request.stop),
            Draws(request.sampling, request.prompt_ids), room, guide=guide, ids=ids, adapter=adapter,
        )  # fmt: skip

    def _check(self, request: Request) -> None:
        ids, vocab = request.prompt_ids, self._model.get_input_embeddings().weight.shape[0]
        if not len(ids):
            raise ConfigError("the prompt is empty", ("expected", "at least one token"))
        wrong = next((i for i in ids if not 0 <= i < vocab), None)
        if wrong is not None:
            raise ConfigError(
                f"the prompt has the id {wrong}", ("expected", f"0 to {vocab - 1}, the model's vocabulary")
            )
        if request.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens: found {request.max_new_tokens}", ("expected", "1 or more"))

    def _room_behind(self, ids: list[int], request: Request, adapter: LoadedAdapter | None) -> int:
        """New tokens that the row may have. Raises ConfigError where none fits."""
        limits = [limit for limit in (self.context, self._capacity) if limit]
        left = min(limits, default=1 << 62) - len(ids)
        if left < 1:
            what = "the model's context" if self.context and len(ids) >= self.context else "the engine's max_tokens"
            own = f" and the adapter {len(adapter.virtual_ids)}" if adapter and adapter.virtual_ids else ""
            raise ConfigError(
                f"the prompt has {len(request.prompt_ids):,} tokens{own}, and {what} is {len(ids) + left:,}",
                ("way out", "a shorter prompt: at least one token has to follow it"),
            )
        return min(request.max_new_tokens, left)
