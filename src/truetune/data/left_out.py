"""Whether a rendered text still says all that a message says; blanks and line breaks are the template's own affair."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from truetune.data.schema import Message


class Text:
    """A rendered text that is asked for one part after another: where the last one was found, the next is near."""

    def __init__(self, text: str) -> None:
        self._text, self._at = text, 0
        self._bare_at = 0

    def says(self, part: str) -> bool:
        """Whether ``part`` is in the text, blanks and line breaks aside."""
        found = self._text.find(part, self._at)  # to the letter, nearly always
        if found >= 0:
            self._at = found
            return True
        if part in self._text:
            return True
        bare = _bare(part)
        found = self._bare.find(bare, self._bare_at)
        self._bare_at = max(self._bare_at, found)
        return found >= 0 or bare in self._bare

    @cached_property
    def _bare(self) -> str:
        return _bare(self._text)


def left_out(message: Message, text: str | Text) -> str:
    """Which part of ``message`` is missing from ``text``, in a word or two for a report; ``""`` when none is.

    A tool's result and the values in a call may stand there as JSON strings.
    """
    text = Text(text) if isinstance(text, str) else text
    contents = [message.content] if message.instruction is None else [message.instruction, message.input or ""]
    if message.role == "tool" and any(text.says(form) for form in (message.content, *_quoted(message.content))):
        contents = []
    if not all(text.says(part) for part in contents):
        return "its text"
    if not text.says(message.reasoning):
        return "its reasoning"
    for call in message.tool_calls:
        function = call["function"]
        if not text.says(function["name"]):
            return f"its call of {function['name']}"
        for leaf in _leaves(function["arguments"]):
            if not any(text.says(form) for form in (leaf, *(quoted[1:-1] for quoted in _quoted(leaf)))):
                return f"an argument of its call of {function['name']}"
    return ""


def _bare(text: str) -> str:
    return "".join(text.split())


def _quoted(text: str) -> list[str]:
    return [json.dumps(text, ensure_ascii=ascii_only) for ascii_only in (True, False)]


def _leaves(value: Any) -> Iterator[str]:
    """The names and texts in a call's arguments; numbers may be worded in more ways than can be listed."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, str):
        yield value
