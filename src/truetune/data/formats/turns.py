"""The list of turns that the messages and sharegpt formats share; they differ in three names and in the roles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from truetune.data.formats.checks import RowError, expect_list, expect_object, text_field
from truetune.data.schema import ROLES, Message
from truetune.errors import nearest

SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
    "function_response": "tool",
}
MESSAGES_ROLES = {role: role for role in ROLES}

# Keys that change what a turn means. To leave them out in silence would train on something else than what is written.
_UNSUPPORTED = ("tool_calls", "function_call", "reasoning_content", "thinking", "weight")


def parse_turns(
    value: Mapping[str, Any], column: str, *, role_key: str, text_key: str, roles: Mapping[str, str]
) -> list[Message]:
    """The turns in ``value[column]``, contents byte for byte.

    Args:
        value: the row.
        column: the field that holds the list of turns.
        role_key: the field of a turn that names its role.
        text_key: the field of a turn that holds its text.
        roles: from the role as the format writes it to one of ``schema.ROLES``.

    Raises:
        RowError: ``missing_field``, ``wrong_type``, ``not_an_object``, ``empty_messages``, ``unknown_role``,
            ``unsupported_key``.
    """
    items = expect_list(value, column)
    if not items:
        raise RowError("empty_messages", f"`{column}` is an empty list")
    named: list[tuple[str, Mapping[str, Any]]] = []
    for number, item in enumerate(items, start=1):
        turn = expect_object(item, what=f"message {number}")
        form = _other_form(turn, role_key)
        named.append((text_field(turn, role_key, where=f"message {number}: ", hint=form), turn))
    _check_roles([role for role, _ in named], roles)
    return [
        Message(role=roles[role], content=_text(turn, text_key, where=f"message {number}: "))
        for number, (role, turn) in enumerate(named, start=1)
    ]


def _text(turn: Mapping[str, Any], text_key: str, *, where: str) -> str:
    for key in _UNSUPPORTED:
        if turn.get(key) or (key == "weight" and turn.get(key) == 0):
            detail = f"{where}`{key}` is not understood; write what is to be learned into `{text_key}`"
            raise RowError("unsupported_key", detail)
    parts = "a list of parts is the form for images; write text" if isinstance(turn.get(text_key), list) else ""
    return text_field(turn, text_key, where=where, hint=parts)


def _check_roles(found: list[str], roles: Mapping[str, str]) -> None:
    unknown = [(number, role) for number, role in enumerate(found, start=1) if role not in roles]
    if not unknown:
        return
    said = ", ".join(f"'{role}' (message {number})" for number, role in unknown[:6])
    names = dict.fromkeys(role for _, role in unknown)
    if all(role in SHAREGPT_ROLES for role in names):
        ours = ", ".join(f"'{role}' is '{SHAREGPT_ROLES[role]}'" for role in names)
        cause = f"they belong to the sharegpt form (`conversations` of `from` and `value`); here {ours}"
    else:
        close = {role: nearest(role, roles) for role in names}
        cause = ", ".join(f"perhaps '{ours}' is meant by '{role}'" for role, ours in close.items() if ours)
    known = f"known are {', '.join(roles)}"
    raise RowError("unknown_role", f"unknown role{'s' if len(unknown) > 1 else ''} {said}; {cause or known}")


def _other_form(turn: Mapping[str, Any], role_key: str) -> str:
    if role_key in turn:
        return ""
    if role_key == "role" and "from" in turn:
        return "`from` and `value` are the sharegpt form: name the list `conversations`"
    if role_key == "from" and "role" in turn:
        return "`role` and `content` are the messages form: name the list `messages`"
    return ""
