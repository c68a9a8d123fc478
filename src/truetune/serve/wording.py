"""From a request to what the engine is asked: prompts worded as in training, and how tokens are chosen."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from truetune.data.formats.checks import RowError
from truetune.data.formats.tool_calls import parse_tools
from truetune.data.formats.turns import parse_turns
from truetune.errors import TemplateError
from truetune.generate.request import Request, Sampling
from truetune.serve.catalogue import Voice
from truetune.serve.protocol import MOST_PROMPTS, Asked, ChatRequest, CompletionRequest
from truetune.serve.refusal import Refusal, of_error
from truetune.serve.tools import Format, format_of

_DEFAULT_COMPLETION = 16  # OpenAI's


@dataclass(frozen=True)
class Job:
    """What one request asks of the engine.

    Attributes:
        prompts: the ids of each, in the request's order.
        requests: ``n`` for each prompt, one prompt after the other.
        echoes: what stands in front of each prompt's answers.
        tools: how this model writes calls of tools, where some may be called.
    """

    voice: Voice
    prompts: tuple[tuple[int, ...], ...]
    requests: tuple[Request, ...]
    echoes: tuple[str, ...]
    tools: Format | None = None

    @property
    def prompt_tokens(self) -> int:
        """Each prompt counts once, however many answers it gets."""
        return sum(map(len, self.prompts))


def of_chat(asked: ChatRequest, voice: Voice, *, longest: int) -> Job:
    """The conversation in this model's template.

    Args:
        longest: tokens that an answer may have.
    Raises:
        Refusal: turns that can't be read, or that the template refuses.
    """
    wanted = asked.max_completion_tokens or asked.max_tokens
    name = "max_completion_tokens" if asked.max_completion_tokens else "max_tokens"
    turns = [turn.model_dump(exclude_unset=True) for turn in asked.messages]
    offered = asked.tools if asked.tool_choice != "none" else None
    speaker = voice.speaker
    try:
        messages, tools = parse_turns({"messages": turns}, "messages"), parse_tools({"tools": offered})
    except RowError as error:
        raise Refusal(400, error.detail, param="tools" if error.reason == "bad_tools" else "messages") from None
    try:
        ids = speaker.conversation_ids(messages, tools=tools)
    except TemplateError as error:
        raise of_error(error, param="messages") from None
    count = None if not asked.logprobs else asked.top_logprobs or 0
    requests = _requests(asked, voice, [ids], _length(wanted, name, longest, longest), count)
    form = format_of(speaker.template.source) if tools and speaker.template is not None else None
    return Job(voice, (tuple(ids),), requests, ("",), form)


def of_completion(asked: CompletionRequest, voice: Voice, *, longest: int) -> Job:
    """The text as it is, behind the token that starts every text where the tokenizer has one.

    Raises:
        Refusal: more prompts than one request may bring, or an answer that is too long.
    """
    tokenizer = voice.speaker.tokenizer
    texts = prompts_of(asked.prompt, "prompt")
    ids = [tokenizer.encode([tokenizer.bos_token + p])[0] if isinstance(p, str) else list(p) for p in texts]
    length = _length(asked.max_tokens, "max_tokens", longest, min(_DEFAULT_COMPLETION, longest))
    echoes = tuple(_echo(asked, text, tokenizer) for text in texts)
    return Job(voice, tuple(map(tuple, ids)), _requests(asked, voice, ids, length, asked.logprobs), echoes)


def prompts_of(value: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]], name: str) -> list[Any]:
    """One or more texts or lists of ids, as a list of them."""
    if isinstance(value, str):
        return [value]
    many: list[Any] = [list(value)] if value and isinstance(value[0], int) else list(value)
    if len(many) > MOST_PROMPTS:
        raise Refusal(400, f"{name}: {len(many)} at once, and at most {MOST_PROMPTS} are taken", param=name)
    return many


def _echo(asked: CompletionRequest, text: str | list[int], tokenizer: Any) -> str:
    if not asked.echo:
        return ""
    return text if isinstance(text, str) else str(tokenizer.decode(text))


def _length(wanted: int | None, name: str, longest: int, default: int) -> int:
    if wanted is not None and wanted > longest:
        raise Refusal(400, f"{name}: {wanted} asked for, and this server gives at most {longest}", param=name)
    return wanted or default


def _requests(
    asked: Asked, voice: Voice, prompts: Sequence[Sequence[int]], length: int, logprobs: int | None
) -> tuple[Request, ...]:
    seed = secrets.randbits(63) if asked.seed is None else asked.seed
    stop_ids = voice.speaker.stop_ids
    return tuple(
        Request(tuple(ids), voice.adapter, _sampling(asked, seed + number), length, asked.stops, stop_ids, logprobs)
        for ids in prompts
        for number in range(asked.n or 1)
    )


def _sampling(asked: Asked, seed: int) -> Sampling:
    """Null means OpenAI's default, as an absent field does."""
    fields = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    defaults = type(asked).model_fields
    given = {f: defaults[f].default if (v := getattr(asked, f)) is None else v for f in fields}
    return Sampling(**given, seed=seed)
