"""What an answer has to look like: JSON that was asked for, or a call that is forced, as a grammar for the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from truetune.errors import nearest
from truetune.generate import grammar
from truetune.serve.protocol import ChatRequest, NamedTool
from truetune.serve.refusal import Refusal
from truetune.serve.tools import Format


def grammar_of(asked: ChatRequest, tools: Sequence[Mapping[str, Any]], form: Format | None) -> str | None:
    """The grammar of a request's answers; None where any text will do.

    Args:
        tools: that may be called.
        form: how this model writes calls; None for a form that is not known.
    Raises:
        Refusal: a call that can't be forced.
    """
    wanted = asked.response_format.rule if asked.response_format is not None else None
    if asked.forces_a_call:
        called = _to_call(asked.tool_choice, tools)
        if form is None:
            said = "the template of this model writes calls in no form that is known here, so none can be forced"
            raise Refusal(400, f"tool_choice: {said}", param="tool_choice")
        many = asked.parallel_tool_calls is not False and not isinstance(asked.tool_choice, NamedTool)
        return grammar.whole("calls") + _rules(called, form, many=many)
    if wanted is None:
        return None
    if tools and form is not None:  # the model may as well call
        many = asked.parallel_tool_calls is not False
        return grammar.whole("said | calls") + f"said: {wanted}\n" + _rules(tools, form, many=many)
    return grammar.whole(wanted)


def _to_call(choice: str | NamedTool | None, tools: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    names = [tool["function"]["name"] for tool in tools]
    if not names:
        raise Refusal(400, "tool_choice: a call is asked for, and there are no tools", param="tool_choice")
    if not isinstance(choice, NamedTool):
        return tools
    if choice.function.name not in names:
        close = nearest(choice.function.name, names)
        hint = f"; did you mean {close!r}?" if close else ""
        raise Refusal(400, f"tool_choice: there is no tool {choice.function.name[:80]!r}{hint}", param="tool_choice")
    return [tools[names.index(choice.function.name)]]


def _rules(tools: Sequence[Mapping[str, Any]], form: Format, *, many: bool) -> str:
    """``calls`` and what it is made of; arguments are a rule each, so that references inside a schema stay its own."""
    lines = ['calls: call ("\\n" call)*' if many else "calls: call"]
    lines.append("call: " + " | ".join(f"call_{number}" for number in range(len(tools))))
    for number, tool in enumerate(tools):
        before, after = form.around(tool["function"]["name"])
        lines.append(f"call_{number}: {grammar.literal(before)} arguments_{number} {grammar.literal(after)}")
        lines.append(f"arguments_{number}: {grammar.of_json(_arguments(tool['function']))}")
    return "\n".join(lines) + "\n"


def _arguments(function: Mapping[str, Any]) -> Mapping[str, Any]:
    schema = function.get("parameters") or {}
    if not isinstance(schema, Mapping) or schema.get("type", "object") != "object":
        said = f"tools: the parameters of {function['name']!r} are no schema of an object"
        raise Refusal(400, said, param="tools")
    return {**schema, "type": "object"}
