"""Chat templates: the tokenizer's own, a named one, or a file; all of them Jinja, all rendered the same way.

There is no silent default. A template that trained an adapter is stored with it (source and hash), so that generating
and merging word their prompts as training did.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from truetune.data.schema import Message
from truetune.data.templates import BUILT_IN, needed_tokens
from truetune.errors import TemplateError, nearest, why_unread


class TextEncoder(Protocol):
    """What this layer needs of a tokenizer."""

    own_template: str | None
    bos_token: str  # "" unless the tokenizer puts one in front of every text by itself
    eos_token: str
    stop_ids: frozenset[int]

    @property
    def by_words(self) -> bool:
        """Whether a text is cut into words by a pattern, and no token depends on anything but its own word."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, with no special token added."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included."""

    def has_token(self, text: str) -> bool:
        """Whether ``text`` is one token of the vocabulary."""

    def render(self, messages: Sequence[Mapping[str, Any]], source: str, *, tools: Any, prompt: bool) -> str:
        """Run a Jinja template in a sandbox; ``prompt`` adds what comes in front of an answer."""


@dataclass(frozen=True)
class Template:
    """A chat template: where it is from, and its Jinja source."""

    name: str  # "own", a built-in name, or a file's path
    source: str

    @property
    def digest(self) -> str:
        """SHA-256 of the source."""
        return hashlib.sha256(self.source.encode()).hexdigest()

    def render(
        self,
        encoder: TextEncoder,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        calls_as_text: bool = False,
        prompt: bool,
    ) -> str:
        """The text a model sees for a conversation.

        Args:
            encoder: of the tokenizer.
            messages: the turns.
            tools: what may be called.
            calls_as_text: the arguments of tool calls as JSON text, which some templates take no other way.
            prompt: add what comes in front of an answer.

        Raises:
            TemplateError: the template refuses it (its own words are passed on).
        """
        as_dicts = [as_dict(message, calls_as_text=calls_as_text) for message in messages]
        return encoder.render(as_dicts, self.source, tools=list(tools) or None, prompt=prompt)


def as_dict(message: Message, *, calls_as_text: bool = False) -> dict[str, Any]:
    """A message as templates know it, after transformers' and OpenAI's names; absent is what it does not have."""
    found: dict[str, Any] = {"role": message.role, "content": message.content}
    found |= {name: v for name in ("instruction", "input") if (v := getattr(message, name)) is not None}
    if message.reasoning:  # by Qwen's and by gpt-oss' name
        found |= {"reasoning_content": message.reasoning, "thinking": message.reasoning}
    if message.tool_calls:
        found["tool_calls"] = [_call(call, as_text=calls_as_text) for call in message.tool_calls]
    names = {"name": message.name, "tool_call_id": message.call_id}
    return found | {name: text for name, text in names.items() if text}


def _call(call: Mapping[str, Any], *, as_text: bool) -> dict[str, Any]:
    function = call["function"]
    arguments = json.dumps(function["arguments"], ensure_ascii=False) if as_text else function["arguments"]
    return {**call, "function": {**function, "arguments": arguments}}


# A prelude ends in a line break, which the tag in front of it eats: the template itself still begins a line, as the
# rules for blanks in front of a tag ask for.
_DEFAULT_SYSTEM = """\
{%% if not messages or messages[0]['role'] != 'system' %%}\
{%% set messages = [{'role': 'system', 'content': %s}] + (messages | list) %%}{%% endif %%}
"""
_PINNED = "{% macro strftime_now(format) %}"
_SWITCH = "enable_thinking"
_NO_THINKING = f"{{% set {_SWITCH} = false %}}\n"


def with_default_system(source: str, system: str | None) -> str:
    """The template with ``system`` in front of every conversation that brings no system message of its own.

    So a model that is given away words its prompts as it was trained, whoever renders them.
    """
    if system is None:
        return source
    return _DEFAULT_SYSTEM % json.dumps(system, ensure_ascii=False) + source  # Jinja knows JSON's escapes


def without_thinking(source: str) -> str:
    """The template told not to open any reasoning, where it can be told: by the switch that Qwen3's has.

    So the prompt that is trained on, and every prompt of the result, is the one for answers that do not think.
    """
    return _NO_THINKING + source if _SWITCH in source and not source.startswith(_NO_THINKING) else source


def asks_for_date(template: Template) -> bool:
    """Whether the template prints the day on which it is rendered."""
    return "strftime_now" in template.source and _PINNED not in template.source


def pin_date(template: Template, date: str) -> Template:
    """The template with ``date`` (ISO) in place of today, at midnight.

    A template that tells the day would be another one tomorrow: for the run that goes on, and for the prompts that are
    served. A macro in the source itself takes the place of the function ``strftime_now``, because no value passed
    from outside may be a function, and so that every program that renders the source says the same.
    """
    day = datetime.fromisoformat(date)
    steps = "".join(
        f" | replace('{code}', {json.dumps(_formatted(day, code))})"
        for code in sorted(set(re.findall(r"%-?[A-Za-z]", template.source)))
        if code.lstrip("%-") in _DATE_CODES
    )
    return Template(template.name, f"{_PINNED}{{{{ format{steps} }}}}{{% endmacro %}}\n{template.source}")


_DATE_CODES = "aAbBcdeDFHIjmMpSTuUVWxXyY"


def _formatted(day: datetime, code: str) -> str:
    """One code of strftime; those that not every platform has are put together from those that it has."""
    own = {"%D": "%m/%d/%y", "%F": "%Y-%m-%d", "%T": "%H:%M:%S", "%e": "%d"}
    text = day.strftime(own.get(code, code.replace("-", "")))
    if code == "%e":
        return str(day.day).rjust(2)
    return text.lstrip("0") or "0" if code.startswith("%-") else text


def resolve_template(setting: str, encoder: TextEncoder) -> Template:
    """Find the template that ``--template`` names.

    Raises:
        TemplateError: none is there, the name is unknown, or the tokenizer lacks the template's tokens.
    """
    if setting == "auto":
        if encoder.own_template is None:
            raise TemplateError(
                "the tokenizer has no chat template, and truetune does not guess one",
                (
                    "way out",
                    "--template alpaca (instructions), plain (bare text), the name of a family, or a Jinja file",
                ),
                ("known", ", ".join(BUILT_IN)),
            )
        return Template("own", encoder.own_template)
    if setting in BUILT_IN:
        missing = [token for token in needed_tokens(setting) if not encoder.has_token(token)]
        if missing:
            raise TemplateError(
                f"--template {setting}: the tokenizer has no token {' or '.join(missing)}",
                ("way out", "--template alpaca or plain, which end an answer with the tokenizer's own end token"),
            )
        source = BUILT_IN[setting]
        # Said in the template itself, so that whoever renders it later needs no rule of ours.
        lead = "{{- bos_token -}}" if encoder.bos_token and "bos_token" not in source else ""
        return Template(setting, lead + source)
    return _from_file(setting)


def _from_file(setting: str) -> Template:
    path = Path(setting)
    if not path.is_file():
        raise TemplateError(
            f"--template: '{setting}' is neither a built-in template nor a file",
            ("did you mean", nearest(setting, ["auto", *BUILT_IN])),
            ("known", "auto, " + ", ".join(BUILT_IN)),
        )
    try:
        return Template(setting, path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise TemplateError(f"--template: {setting} can't be read: {why_unread(error)}") from None
