"""Calls of tools in the text of an answer, for templates that write them in a form with a name.

Known is Hermes' form, which Qwen's templates share: a JSON object of ``name`` and ``arguments`` between ``<tool_call>``
and ``</tool_call>``. What a model writes otherwise stays text.
"""

from __future__ import annotations

import json
import re
import secrets
from dataclasses import dataclass
from typing import Any

from truetune.serve.responses import Function, ToolCall


@dataclass(frozen=True)
class Format:
    """How calls are written."""

    begin: str
    end: str

    def around(self, name: str) -> tuple[str, str]:
        """What stands in front of the arguments in a call of a tool, and behind them."""
        return f'{self.begin}\n{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": ', f"}}\n{self.end}"

    def split(self, text: str) -> tuple[str, list[ToolCall]]:
        """``(what is said, the calls)``; all of it is text where one of the calls can't be read."""
        at = text.find(self.begin)
        if at < 0:
            return text, []
        parts = re.findall(f"{re.escape(self.begin)}(.*?)(?:{re.escape(self.end)}|$)", text[at:], re.DOTALL)
        calls = [_call(part, number) for number, part in enumerate(parts)]
        read = [call for call in calls if call is not None]
        return (text[:at].rstrip(), read) if len(read) == len(calls) else (text, [])

    def certain(self, text: str) -> int:
        """How many characters of a text that goes on are certainly no part of a call, nor white space before one."""
        at = text.find(self.begin)
        if at < 0:
            lengths = range(min(len(self.begin) - 1, len(text)), 0, -1)
            at = len(text) - next((n for n in lengths if text.endswith(self.begin[:n])), 0)
        return len(text[:at].rstrip())


_HERMES = Format("<tool_call>", "</tool_call>")


def format_of(source: str) -> Format | None:
    """How a template has calls written; None for a form that is not known."""
    # Other templates use the same tags around a form of their own, which has no "arguments" in quotes.
    is_json = re.search(r'\\?"arguments\\?"', source) is not None
    return _HERMES if _HERMES.begin in source and _HERMES.end in source and is_json else None


def _call(text: str, number: int) -> ToolCall | None:
    try:
        found: Any = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    arguments = found.get("arguments", {})
    if not isinstance(arguments, dict):
        return None
    function = Function(name=found["name"], arguments=json.dumps(arguments, ensure_ascii=False))
    return ToolCall(index=number, id=f"call_{secrets.token_hex(12)}", type="function", function=function)
