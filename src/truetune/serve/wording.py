"""From a request to what the engine is asked: prompts worded as in training, and how tokens are chosen."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from truetune.data.formats.checks import RowError
from truetune.data.formats.tool_calls import parse_tools
from truetune.data.formats.turns import parse_turns
from truetune.errors import ConfigError, TemplateError
from truetune.generate.engine import Engine
from truetune.generate.grammar import Grammar, Grammars
from truetune.generate.request import Request, Sampling
from truetune.serve.catalogue import Voice
from truetune.serve.forms import grammar_of
from truetune.serve.protocol import MOST_PROMPTS, Asked, ChatRequest, CompletionRequest
from truetune.serve.refusal import Refusal, of_error
from truetune.serve.tools import Format, format_of

_DEFAULT_COMPLETION = 16  # OpenAI's


@dataclass(frozen=True)
class Allowance:
    """What a request may ask for.

    Attributes:
        longest: tokens of an answer.
        grammars: for answers of a form that was asked for.
        characters: of a prompt: so many are surely more tokens than the model's context, and are not even counted out.
    """

    longest: int
    grammars: Grammars
    characters: int | None = None

    @classmethod
    def of(cls, longest: int, engine: Engine) -> Allowance:
        """By the model's context and its longest token."""
        pieces = engine.tokenizer.hf.get_vocab() if engine.context else ()
        # Twice, as a tokenizer may put two characters together before it looks for tokens.
        most = 2 * engine.context * max(map(len, pieces)) if engine.context and pieces else None
        return cls(longest, engine.grammars, most)

    def check(self, texts: Sequence[Any], param: str) -> None:
        """Raises Refusal: 400 for more characters than a prompt can have; what is no text is passed over."""
        count = max((len(text) for text in texts if isinstance(text, str)), default=0)
        if self.characters is not None and count > self.characters:
            said = f"{param}: {count:,} characters are more than the model's context holds"
            raise Refusal(400, said, param=param, code="context_length_exceeded")


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


def of_chat(asked: ChatRequest, voice: Voice, allowed: Allowance) -> Job:
    """The conversation in this model's template.

    Raises:
        Refusal: turns that can't be read, or that the template refuses, or a form that can't be had.
    """
    wanted = asked.max_completion_tokens or asked.max_tokens
    name = "max_completion_tokens" if asked.max_completion_tokens else "max_tokens"
    turns = [turn.model_dump(exclude_unset=True) for turn in asked.messages]
    offered = asked.tools if asked.tool_choice != "none" else None
    speaker = voice.speaker
    allowed.check([turn.get("content") for turn in turns], "messages")
    try:
        messages, tools = parse_turns({"messages": turns}, "messages"), parse_tools({"tools": offered})
    except RowError as error:
        raise Refusal(400, error.detail, param="tools" if error.reason == "bad_tools" else "messages") from None
    try:
        ids = speaker.conversation_ids(messages, tools=tools)
    except TemplateError as error:
        raise of_error(error, param="messages") from None
    count = None if not asked.logprobs else asked.top_logprobs or 0
    length = _length(wanted, name, allowed.longest, allowed.longest)
    form = format_of(speaker.template.source) if tools and speaker.template is not None else None
    how = _Asking(length, count, _grammar(asked, tools, form, allowed.grammars))
    requests = _requests(asked, voice, [ids], how)
    return Job(voice, (tuple(ids),), requests, ("",), form)


def of_completion(asked: CompletionRequest, voice: Voice, allowed: Allowance) -> Job:
    """The text as it is, behind the token that starts every text where the tokenizer has one.

    Raises:
        Refusal: more prompts than one request may bring, or an answer that is too long.
    """
    tokenizer = voice.speaker.tokenizer
    texts = prompts_of(asked.prompt, "prompt")
    allowed.check(texts, "prompt")
    ids = [tokenizer.encode([tokenizer.bos_token + p])[0] if isinstance(p, str) else list(p) for p in texts]
    length = _length(asked.max_tokens, "max_tokens", allowed.longest, min(_DEFAULT_COMPLETION, allowed.longest))
    echoes = tuple(_echo(asked, text, tokenizer) for text in texts)
    requests = _requests(asked, voice, ids, _Asking(length, asked.logprobs))
    return Job(voice, tuple(map(tuple, ids)), requests, echoes)


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


def _grammar(
    asked: ChatRequest, tools: Sequence[Mapping[str, Any]], form: Format | None, grammars: Grammars
) -> Grammar | None:
    text = grammar_of(asked, tools, form)
    if text is None:
        return None
    try:
        return grammars.read(text)
    except ConfigError as error:
        raise of_error(error, param="tools" if asked.forces_a_call else "response_format") from None


@dataclass(frozen=True)
class _Asking:
    """What the routes ask for in words of their own."""

    length: int
    logprobs: int | None
    grammar: Grammar | None = None


def _requests(asked: Asked, voice: Voice, prompts: Sequence[Sequence[int]], how: _Asking) -> tuple[Request, ...]:
    seed = secrets.randbits(63) if asked.seed is None else asked.seed
    return tuple(
        Request(
            tuple(ids), voice.adapter, _sampling(asked, seed + number), how.length, asked.stops,
            voice.speaker.stop_ids, how.logprobs, how.grammar, voice.stamp,
        )
        for ids in prompts
        for number in range(asked.n or 1)
    )  # fmt: skip


def _sampling(asked: Asked, seed: int) -> Sampling:
    """Null means OpenAI's default, as an absent field does."""
    fields = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    defaults = type(asked).model_fields
    given = {f: defaults[f].default if (v := getattr(asked, f)) is None else v for f in fields}
    return Sampling(**given, seed=seed)
