"""sharegpt: `conversations`, a list of {from, value}; `tools` and `system` are optional.

A `function_call` is a turn of the assistant and is learned like any answer; what came back is a turn of the tool.
"""

from __future__ import annotations

from truetune.data.formats.checks import check_answers, expect_object, system_message
from truetune.data.formats.tool_calls import parse_tools
from truetune.data.formats.turns import parse_turns
from truetune.data.schema import RawRow, Row

NAME = "sharegpt"
COLUMNS = "conversations (a list of from, value), tools (optional), system (optional)"
LISTS = ("conversations", "conversation")


def fits(columns: set[str]) -> bool:
    """Whether a row with these fields is meant to be of this format."""
    return not columns.isdisjoint(LISTS)


def parse(raw: RawRow) -> Row:
    """The conversation with our names for the roles.

    Raises:
        RowError: any of the reasons of ``parse_turns``, ``check_answers`` and ``parse_tools``.
    """
    value = expect_object(raw.value)
    column = "conversation" if "conversation" in value and "conversations" not in value else "conversations"
    messages = [*system_message(value), *parse_turns(value, column)]
    check_answers(messages)
    return Row(raw.origin, messages=tuple(messages), tools=parse_tools(value))
