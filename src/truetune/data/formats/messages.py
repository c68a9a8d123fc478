"""messages: `messages`, a list of {role, content} with the roles system, user, assistant and tool; `tools` optional."""

from __future__ import annotations

from truetune.data.formats.checks import check_answers, expect_object, parse_tools
from truetune.data.formats.turns import MESSAGES_ROLES, parse_turns
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
    messages = parse_turns(value, "messages", role_key="role", text_key="content", roles=MESSAGES_ROLES)
    check_answers(messages)
    return Row(raw.origin, messages=tuple(messages), tools=parse_tools(value))
