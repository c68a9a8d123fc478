"""Tools, and the calls to them, in one form whatever form they come in: OpenAI's, with arguments as an object.

In the wild a tool stands bare or inside ``{"type": "function", …}``, its arguments are an object or JSON text of one,
and a whole list or call may itself be JSON text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from truetune.data.formats.checks import RowError, kind


def parse_tools(value: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """The ``tools`` of a row, a list of objects or JSON text of one; absent, null and empty mean none.

    Raises:
        RowError: ``bad_tools``.
    """
    tools = value.get("tools")
    if isinstance(tools, str):
        tools = _from_text(tools, "bad_tools", "`tools`") if tools.strip() else None
    if not tools:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("bad_tools", f"`tools` is {kind(tools)}, a list of objects (or JSON text of one) is expected")
    return tuple(_tool(tool, number) for number, tool in enumerate(tools, start=1))


def parse_calls(turn: Mapping[str, Any], *, where: str) -> tuple[Mapping[str, Any], ...]:
    """The calls of an assistant's turn: its ``tool_calls``, or the one ``function_call`` of the older form.

    Args:
        turn: the turn.
        where: words before a field's name in a report, such as ``message 2: ``.

    Raises:
        RowError: ``bad_tool_call``.
    """
    calls, single = turn.get("tool_calls"), turn.get("function_call")
    if calls and single:
        raise RowError("ambiguous", f"{where}`tool_calls` and `function_call` are both there: keep one")
    if single:
        return (_call(single, f"{where}`function_call`"),)
    if not calls:
        return ()
    if isinstance(calls, str):
        calls = _from_text(calls, "bad_tool_call", f"{where}`tool_calls`")
    if not isinstance(calls, list):
        raise RowError("bad_tool_call", f"{where}`tool_calls` is {kind(calls)}, a list is expected")
    return tuple(_call(call, f"{where}`tool_calls` entry {number}") for number, call in enumerate(calls, start=1))


def calls_in_text(content: Any, *, where: str) -> tuple[Mapping[str, Any], ...]:
    """The call, or the list of them, that a turn of sharegpt's role ``function_call`` is.

    Raises:
        RowError: ``bad_tool_call``.
    """
    found = _from_text(content, "bad_tool_call", where) if isinstance(content, str) else content
    many = found if isinstance(found, list) and found else [found]
    return tuple(_call(call, where) for call in many)


def _tool(tool: Mapping[str, Any], number: int) -> Mapping[str, Any]:
    inner = tool.get("function")
    whole = tool if isinstance(inner, dict) else {"type": "function", "function": _without_nulls(tool)}
    if not isinstance(whole["function"].get("name"), str) or not whole["function"]["name"]:
        raise RowError("bad_tools", f"`tools` entry {number} has no name: `function` with `name` is expected")
    return _without_nulls(whole) if whole is tool else whole


def _call(call: Any, where: str) -> Mapping[str, Any]:
    inner = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str) or not inner["name"]:
        raise RowError("bad_tool_call", f"{where}: an object of `name` and `arguments` is expected")
    given = inner.get("arguments", inner.get("parameters"))
    arguments = _from_text(given, "bad_tool_call", f"{where}: `arguments`") if isinstance(given, str) else given
    if not isinstance(arguments, dict) and arguments is not None:
        raise RowError("bad_tool_call", f"{where}: `arguments` is {kind(arguments)}, an object is expected")
    named = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**named, "type": "function", "function": {"name": inner["name"], "arguments": arguments or {}}}


def _without_nulls(value: Any) -> Any:
    """A Parquet table gives every object the fields of all others, and null for those it lacks."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _from_text(text: str, reason: str, where: str) -> Any:
    try:
        return json.loads(text) if text.strip() else None
    except (ValueError, RecursionError) as error:
        raise RowError(reason, f"{where} is text, but not valid JSON: {error}") from error
