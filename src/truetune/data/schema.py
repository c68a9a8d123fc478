"""What the data layer speaks of: messages, rows as read, and rejects with their reason.

A row is found by its file and its number (the line of a JSONL file, the position in a JSON array, CSV or Parquet
table; counted from 1), and keeps both through every stage, so that any later report can name it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a row came from."""

    file: str
    row: int  # counted from 1

    def __str__(self) -> str:
        return f"{self.file}, row {self.row}"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    ``instruction`` and ``input`` are set for alpaca rows, whose template words the two apart; ``content`` then
    holds both joined, for every other template. ``reasoning`` is what an answer thinks before it speaks, where the row
    keeps the two apart. ``tool_calls`` are those of an answer, each ``{"type": "function", "function": {"name": text,
    "arguments": object}}`` with an ``id`` where it has one; ``name`` and ``call_id`` say which of them a tool's turn
    replies to. ``train`` is False for an answer that its row wants left as context.
    """

    role: str  # one of ROLES
    content: str
    instruction: str | None = None
    input: str | None = None
    reasoning: str = ""
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    name: str = ""
    call_id: str = ""
    train: bool = True


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row as the file holds it, before its format is known. ``value`` is whatever JSON allows."""

    origin: Origin
    value: Any


@dataclass(frozen=True, slots=True)
class Row:
    """A row whose format is understood: a conversation, or a plain text (then ``messages`` is empty).

    ``tools`` are those the conversation may call, each ``{"type": "function", "function": {"name": …, …}}``.
    ``dropped`` names the policies of ``data.policy`` that took something off the row; it is no part of its content.
    """

    origin: Origin
    messages: tuple[Message, ...] = ()
    text: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()
    dropped: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class Preference:
    """A prompt with a better and a worse continuation; a row that judges one answer alone has only one of the two."""

    origin: Origin
    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...] = ()
    rejected: tuple[Message, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Reject:
    """A row that is not used, and why.

    ``reason`` is a short slug to count by (``bad_json``, ``missing_field``, …); ``detail`` is the sentence a person
    reads; ``raw`` is the start of the row as found, for ``rejects.jsonl``.
    """

    origin: Origin
    reason: str
    detail: str
    raw: str = ""
