"""What answers look like on the way out: pieces put together, tokens' probabilities named, fields filled."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from truetune.generate.request import Delta, TokenLogprob
from truetune.models.tokenizer import ChatTokenizer
from truetune.serve.refusal import server_fault
from truetune.serve.responses import (
    ChatLogprobs,
    FinishReason,
    TextLogprobs,
    TokenLogprobs,
    TopLogprob,
    Usage,
)

_UNFINISHED = "\ufffd"


@dataclass
class Heard:
    """One answer so far."""

    text: str = ""
    tokens: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: FinishReason | None = None

    def hear(self, delta: Delta, stop_ids: frozenset[int]) -> list[TokenLogprob]:
        """Take a piece in; returns the probabilities of its tokens, without that of a token that ends the answer.

        Raises:
            Refusal: the answer failed.
        """
        if delta.finish in ("error", "cancelled"):
            raise server_fault(delta.error or "the server stopped before the answer was complete")
        self.text += delta.text
        self.tokens += len(delta.ids)
        new = [entry for entry in delta.logprobs or () if entry.id not in stop_ids]
        self.logprobs += new
        if delta.finish is not None:
            self.finish = "length" if delta.finish == "length" else "stop"
        return new


@dataclass(frozen=True)
class Label:
    """What every event of an answer says of itself."""

    id: str
    created: int
    model: str

    @classmethod
    def new(cls, kind: str, model: str) -> Label:
        """For an answer that begins now."""
        return cls(f"{kind}-{secrets.token_hex(12)}", int(time.time()), model)


def usage_of(prompt_tokens: int, heard: Sequence[Heard]) -> Usage:
    """The tokens of a request."""
    new = sum(one.tokens for one in heard)
    return Usage(prompt_tokens=prompt_tokens, completion_tokens=new, total_tokens=prompt_tokens + new)


def chat_logprobs(entries: Sequence[TokenLogprob], tokenizer: ChatTokenizer) -> ChatLogprobs:
    """In the form of the chat route."""

    def named(token: int, logprob: float) -> TopLogprob:
        text = tokenizer.decode([token])
        # A token that is a part of a character has bytes of its own, which the decoder does not give away.
        return TopLogprob(token=text, logprob=logprob, bytes=None if _UNFINISHED in text else list(text.encode()))

    content = [
        TokenLogprobs(**named(entry.id, entry.logprob).model_dump(), top_logprobs=[named(*top) for top in entry.top])
        for entry in entries
    ]
    return ChatLogprobs(content=content)


def text_logprobs(entries: Sequence[TokenLogprob], tokenizer: ChatTokenizer, *, offset: int) -> TextLogprobs:
    """In the form of the older route.

    Args:
        offset: characters in front of the first of them.
    """
    tokens = [tokenizer.decode([entry.id]) for entry in entries]
    offsets = [offset + sum(map(len, tokens[:i])) for i in range(len(tokens))]
    tops = [{tokenizer.decode([token]): logprob for token, logprob in reversed(entry.top)} for entry in entries]
    return TextLogprobs(
        tokens=tokens, token_logprobs=[entry.logprob for entry in entries], top_logprobs=tops, text_offset=offsets
    )
