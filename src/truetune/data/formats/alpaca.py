"""alpaca: an instruction, an optional input, an output.

Spellings in the wild: `response` for the output (GPTeacher, Dolly), `context` for the input (Dolly), earlier turns in
`history`, and self-instruct's `instances`, a list of one {input, output}. Texts are kept byte for byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from truetune.data.formats.checks import (
    RowError,
    answer_field,
    check_answers,
    expect_list,
    expect_object,
    is_blank,
    optional_text,
    system_message,
    text_field,
)
from truetune.data.schema import Message, RawRow, Row

NAME = "alpaca"
COLUMNS = "instruction, input (optional), output or response"


def fits(columns: set[str]) -> bool:
    """Whether a row with these fields is meant to be of this format."""
    return "instruction" in columns and not columns.isdisjoint({"output", "response", "instances"})


def parse(raw: RawRow) -> Row:
    """A conversation: system (if given), earlier turns, the user's turn, the answer.

    Raises:
        RowError: ``not_an_object``, ``missing_field``, ``wrong_type``, ``empty_output``, ``two_inputs``, ``ambiguous``.
    """
    value = _flat(expect_object(raw.value))
    question = asked(value)
    messages = [*question, Message("assistant", answer_field(value, _answer_column(value)))]
    check_answers(messages)
    return Row(raw.origin, messages=tuple(messages))


def asked(value: Mapping[str, Any]) -> list[Message]:
    """What comes before the answer: a system message if given, earlier turns, the user's turn.

    Raises:
        RowError: as ``parse``.
    """
    instruction, added = text_field(value, "instruction"), _added(value)
    return [*system_message(value), *_history(value), _question(instruction, added)]


def _answer_column(value: Mapping[str, Any]) -> str:
    given = [name for name in ("output", "response") if value.get(name) is not None]
    if len({value[name] if isinstance(value[name], str) else name for name in given}) > 1:
        raise RowError("ambiguous", "`output` and `response` are both there and differ: --columns output=… says which")
    return given[0] if given else "response" if "response" in value and "output" not in value else "output"


def _added(value: Mapping[str, Any]) -> str:
    """`input` or `context`, whichever says something; tables that were joined have both columns."""
    added, context = optional_text(value, "input"), optional_text(value, "context")
    if added.strip() and context.strip() and added != context:
        raise RowError("two_inputs", "`input` and `context` are both there and differ: keep one, or join the two")
    return context if context.strip() and not added.strip() else added or context


def _question(instruction: str, added: str) -> Message:
    content = "\n\n".join(part for part in (instruction, added) if part)
    return Message("user", content, instruction=instruction, input=added)


def _history(value: Mapping[str, Any]) -> list[Message]:
    if value.get("history") is None:
        return []
    messages = []
    for number, pair in enumerate(expect_list(value, "history"), start=1):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise RowError("wrong_type", f"`history` turn {number}: a pair [question, answer] of texts is expected")
        question, answer = pair
        if is_blank(answer):
            raise RowError("empty_output", f"`history` turn {number}: the answer is empty or white space only")
        messages += [_question(question, ""), Message("assistant", answer)]
    return messages


def _flat(value: Mapping[str, Any]) -> Mapping[str, Any]:
    """self-instruct's one instance, lifted into the row."""
    if "instances" not in value or "output" in value:
        return value
    instances = expect_list(value, "instances")
    if len(instances) != 1:
        detail = f"`instances` holds {len(instances)}; expected is exactly one: write one row for each"
        raise RowError("wrong_type", detail)
    return {"instruction": value.get("instruction"), **expect_object(instances[0], what="`instances` entry 1")}
