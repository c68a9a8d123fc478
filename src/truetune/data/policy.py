"""What a row brings beside its questions and answers (reasoning, tools, system messages) is kept, dropped, or refused.

Which of the three is always the user's word. Kept is the default; a template that has no place for what is kept makes
the row a reject.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from truetune.data.formats.checks import RowError, check_answers
from truetune.data.schema import Message, Row

Policy = Literal["keep", "drop", "error"]

_THOUGHTS = re.compile(r"\A\s*<think>.*?</think>\s*", re.DOTALL)  # further on it is what the answer speaks of


@dataclass(frozen=True)
class Policies:
    """One policy for each kind of thing."""

    thinking: Policy = "keep"
    tools: Policy = "keep"
    system_messages: Policy = "keep"

    def apply(self, row: Row) -> Row:
        """The row without what is dropped; the very same row where nothing is.

        Raises:
            RowError: ``thinking``, ``tools`` or ``system``: it brings what the user does not want;
                ``empty_output``: nothing but reasoning was in an answer.
        """
        if self.thinking != "keep" and any(map(_thinks, row.messages)):
            _refuse(self.thinking, "thinking", "an answer brings its reasoning", "--thinking")
            row = _less(row, "thinking", messages=tuple(map(_without_thoughts, row.messages)))
            check_answers(row.messages)
        if self.tools != "keep" and row.tools:
            _refuse(self.tools, "tools", f"the row brings {len(row.tools)} tools", "--tools")
            row = _less(row, "tools", tools=())
        if self.system_messages != "keep" and any(message.role == "system" for message in row.messages):
            _refuse(self.system_messages, "system", "the row brings a system message", "--system-messages")
            rest = tuple(message for message in row.messages if message.role != "system")
            row = _less(row, "system_messages", messages=rest)
        return row

    def dropping(self) -> list[str]:
        """The kinds that are dropped, by the names that ``Row.dropped`` has for them."""
        return [field.name for field in fields(self) if getattr(self, field.name) == "drop"]


def drops(rows: Iterable[Row]) -> Counter[str]:
    """From how many rows something was dropped, by its kind."""
    return Counter(name for row in rows for name in row.dropped)


def _less(row: Row, name: str, **left: Any) -> Row:
    return replace(row, dropped=(*row.dropped, name), **left)


def _refuse(policy: Policy, reason: str, found: str, flag: str) -> None:
    if policy == "error":
        raise RowError(reason, f"{found} ({flag} error; keep and drop are the other two)")


def _thinks(message: Message) -> bool:
    return message.role == "assistant" and bool(message.reasoning or _THOUGHTS.match(message.content))


def _without_thoughts(message: Message) -> Message:
    if not _thinks(message):
        return message
    return replace(message, reasoning="", content=_THOUGHTS.sub("", message.content, count=1))
