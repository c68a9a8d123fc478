"""sharegpt: `conversations`, a list of {from, value}; `tools` and `system` are optional.

A `function_call` is a turn of the assistant and is learned like any answer; what came back is a turn of the tool.
"""

from __future__ import annotations

from truetune.data.formats.checks import check_answers, expect_object, optional_text, parse_tools
from truetune.data.formats.turns import SHAREGPT_ROLES, parse_turns
from truetune.data.schema import Message, RawRow, Row

NAME = "sharegpt"
COLUMNS = "conversations (a list of from, value), tools (optional), system (optional)"


def fits(columns: set[str]) -> bool:
    """Whether a row with these fields is meant to be of this format."""
    return "conversations" in columns


def parse(raw: RawRow) -> Row:
    """The conversation with our names for the roles.

    Raises:
        RowError: any of the reasons of ``parse_turns``, ``check_answers`` and ``parse_tools``.
    """
    value = expect_object(raw.value)
    system = optional_text(value, "system")
    messages = [Message("system", system)] if system else []
    messages += parse_turns(value, "conversations", role_key="from", text_key="value", roles=SHAREGPT_ROLES)
    check_answers(messages)
    return Row(raw.origin, messages=tuple(messages), tools=parse_tools(value))
