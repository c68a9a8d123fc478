"""messages: `messages`, a list of {role, content} as OpenAI's; `tools` optional.

An answer may have `tool_calls`, `reasoning_content`, and a `weight` (or `train`) of 0 that leaves it as context.
"""

from __future__ import annotations

from truetune.data.formats.checks import check_answers, expect_object, system_message
from truetune.data.formats.tool_calls import parse_tools
from truetune.data.formats.turns import parse_turns
from truetune.data.schema import RawRow, Row

NAME = "messages"
COLUMNS = "messages (a list of role, content), tools (optional)"


def fits(columns: set[str]) -> bool:
    """Whether a row with these fields is meant to be of this format."""
    return "messages" in columns


def parse(raw: RawRow) -> Row:
    """The conversation as it is.

    Raises:
        RowError: any of the reasons of ``parse_turns``, ``check_answers`` and ``parse_tools``.
    """
    value = expect_object(raw.value)
    messages = [*system_message(value), *parse_turns(value, "messages")]
    check_answers(messages)
    return Row(raw.origin, messages=tuple(messages), tools=parse_tools(value))
