"""Whether a rendered text still says all that a message says; blanks and line breaks are the template's own affair."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from truetune.data.schema import Message


def left_out(message: Message, text: str) -> str:
    """Which part of ``message`` is missing from ``text``, in a word or two for a report; ``""`` when none is.

    A tool's result and the values in a call may stand there as JSON strings.
    """
    contents = [message.content] if message.instruction is None else [message.instruction, message.input or ""]
    if message.role == "tool" and any(_says(text, quoted) for quoted in _quoted(message.content)):
        contents = []
    if not all(_says(text, part) for part in contents):
        return "its text"
    if not _says(text, message.reasoning):
        return "its reasoning"
    for call in message.tool_calls:
        function = call["function"]
        if not _says(text, function["name"]):
            return f"its call of {function['name']}"
        for leaf in _leaves(function["arguments"]):
            if not any(_says(text, form) for form in (leaf, *(quoted[1:-1] for quoted in _quoted(leaf)))):
                return f"an argument of its call of {function['name']}"
    return ""


def _says(text: str, part: str) -> bool:
    return part in text or _bare(part) in _bare(text)  # to the letter, nearly always


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
