"""The list of turns that the messages and sharegpt formats share.

A turn is ``{role, content}`` or ``{from, value}``, whatever the list is called; the two forms have their own roles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from truetune.data.formats.checks import RowError, expect_list, expect_object, kind, optional_text, text_field
from truetune.data.formats.tool_calls import calls_in_text, parse_calls
from truetune.data.schema import ROLES, Message
from truetune.errors import nearest

_SAID_AS_A_CALL = ("function_call", "tool_call")  # their text is the call itself
SHAREGPT_ROLES = {
    "system": "system",
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "bot", "chatgpt", "bing", "bard", "claude"), "assistant"),
    **dict.fromkeys(_SAID_AS_A_CALL, "assistant"),
    **dict.fromkeys(("observation", "tool", "function_response", "tool_response", "ipython"), "tool"),
}
MESSAGES_ROLES = {role: role for role in ROLES} | {"developer": "system", "function": "tool"}
_FORMS = {"role": ("content", MESSAGES_ROLES), "from": ("value", SHAREGPT_ROLES)}

_REASONING = ("reasoning_content", "reasoning", "thinking")
_TRAINED = ("train", "training", "weight", "loss")
# Keys that change what a turn means. To leave them out in silence would train on something else than what is written.
_UNSUPPORTED = ("audio", "refusal", "loss_scale")


def parse_turns(value: Mapping[str, Any], column: str) -> list[Message]:
    """The turns in ``value[column]``, contents byte for byte.

    Raises:
        RowError: ``missing_field``, ``wrong_type``, ``not_an_object``, ``empty_messages``, ``unknown_role``,
            ``unsupported_key``, ``media``, ``bad_tool_call``, ``ambiguous``.
    """
    items = expect_list(value, column)
    if not items:
        raise RowError("empty_messages", f"`{column}` is an empty list")
    turns = [expect_object(item, what=f"message {number}") for number, item in enumerate(items, start=1)]
    role_key = _role_key(turns, column)
    named = [text_field(turn, role_key, where=f"message {n}: ", hint=_hint(turn)) for n, turn in enumerate(turns, 1)]
    _check_roles(named, _FORMS[role_key][1])
    pairs = zip(named, turns, strict=True)
    return [_message(role, turn, role_key, number) for number, (role, turn) in enumerate(pairs, start=1)]


def as_context(turns: Sequence[Message]) -> tuple[Message, ...]:
    """The turns with none of their answers to be learned."""
    return tuple(replace(turn, train=False) if turn.role == "assistant" else turn for turn in turns)


def _role_key(turns: Sequence[Mapping[str, Any]], column: str) -> str:
    for key in _FORMS:
        if all(key in turn for turn in turns):
            return key
    found = [key for key in _FORMS if any(key in turn for turn in turns)]
    if len(found) > 1:
        raise RowError("ambiguous", f"`{column}` mixes turns of `role` and `content` with turns of `from` and `value`")
    return found[0] if found else "from" if column == "conversations" else "role"


def _hint(turn: Mapping[str, Any]) -> str:
    close = nearest("role", [str(key) for key in turn])
    return f"is `{close}` meant?" if close and close != "role" else ""


def _message(said: str, turn: Mapping[str, Any], role_key: str, number: int) -> Message:
    text_key, roles = _FORMS[role_key]
    where, role = f"message {number}: ", roles[said]
    for key in _UNSUPPORTED:
        if turn.get(key):
            detail = f"{where}`{key}` is not understood; write what is to be learned into `{text_key}`"
            raise RowError("unsupported_key", detail)
    if said in _SAID_AS_A_CALL:
        if text_key not in turn:
            raise RowError("missing_field", f"{where}`{text_key}` is missing")
        calls, content = calls_in_text(turn[text_key], where=f"{where}`{text_key}`"), ""
    else:
        calls = parse_calls(turn, where=where)
        content = _content(turn, text_key, where=where, may_be_empty=bool(calls))
    reasoning = _one_of(turn, _REASONING, where)
    if role != "assistant" and (calls or reasoning):
        what = "`tool_calls`" if calls else "reasoning"
        raise RowError("unsupported_key", f"{where}{what} in a turn of the {role}: only the assistant's may have it")
    train = _trained(turn, role, where)
    name = optional_text(turn, "name", where=where) if role == "tool" else ""
    call_id = optional_text(turn, "tool_call_id", where=where) if role == "tool" else ""
    return Message(role, content, reasoning=reasoning, tool_calls=calls, name=name, call_id=call_id, train=train)


def _content(turn: Mapping[str, Any], key: str, *, where: str, may_be_empty: bool) -> str:
    """Text, or OpenAI's list of parts if all of them are text: then those, one directly behind the other."""
    found = turn.get(key)
    if found is None and may_be_empty:
        return ""
    if not isinstance(found, list):
        return text_field(turn, key, where=where)
    texts = []
    for part in found:
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None
        if not isinstance(text, str):
            what = f"a part of type '{part['type']}'" if isinstance(part, dict) and part.get("type") else kind(part)
            raise RowError("media", f"{where}`{key}` has {what}: only text can be trained on")
        texts.append(text)
    return "".join(texts)


def _one_of(turn: Mapping[str, Any], keys: Sequence[str], where: str) -> str:
    texts = {text for key in keys if (text := optional_text(turn, key, where=where)).strip()}
    if len(texts) > 1:
        raise RowError("ambiguous", f"{where}its reasoning is there twice and differs: keep one of {', '.join(keys)}")
    return texts.pop() if texts else ""


def _trained(turn: Mapping[str, Any], role: str, where: str) -> bool:
    """Whether an answer is to be learned, by its own flag."""
    given = {key: turn[key] for key in _TRAINED if turn.get(key) is not None}
    for key, flag in given.items():
        if not isinstance(flag, bool | int | float) or flag not in (0, 1):
            raise RowError("unsupported_key", f"{where}`{key}` is {flag!r}; 0 or 1 (true or false) is understood")
        if flag and role != "assistant":
            detail = f"{where}`{key}` would train a turn of the {role}: only answers are trained (or --train-on all)"
            raise RowError("unsupported_key", detail)
    if len({bool(flag) for flag in given.values()}) > 1:
        raise RowError("ambiguous", f"{where}{', '.join(f'`{key}`' for key in given)} say different things: keep one")
    return all(given.values())


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
