"""prompt-completion: a question and an answer, of which the second is learned. Several pairs of names are in use.

Either may be a text or a list of turns; of a prompt's own answers none is learned.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from truetune.data.formats.checks import (
    RowError,
    answer_field,
    check_answers,
    expect_object,
    system_message,
    text_field,
)
from truetune.data.formats.tool_calls import parse_tools
from truetune.data.formats.turns import as_context, parse_turns
from truetune.data.schema import Message, RawRow, Row

NAME = "prompt-completion"
PAIRS = (
    ("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("question", "response"),
    ("query", "response"), ("problem", "solution"), ("input", "output"), ("text", "code"),
)  # fmt: skip
COLUMNS = "; or ".join(f"{prompt}, {completion}" for prompt, completion in PAIRS)


def fits(columns: set[str]) -> bool:
    """Whether a row with these fields is meant to be of this format."""
    return any(_fits(columns, pair) for pair in PAIRS)


def parse(raw: RawRow) -> Row:
    """A conversation: the prompt's turns, then the answer's.

    Raises:
        RowError: ``not_an_object``, ``missing_field``, ``wrong_type``, ``empty_output``, ``ambiguous``, and those of
            ``parse_turns`` for lists of turns.
    """
    value = expect_object(raw.value)
    prompt, completion = _pair(value)
    messages = [*system_message(value), *prompt_turns(value, prompt), *answer_turns(value, completion)]
    check_answers(messages)
    return Row(raw.origin, messages=tuple(messages), tools=parse_tools(value))


def prompt_turns(value: Mapping[str, Any], column: str) -> list[Message]:
    """What comes before the answer: a text is the user's, a list of turns is taken as it is.

    Raises:
        RowError: as ``parse``.
    """
    if isinstance(value.get(column), list):
        return [*as_context(parse_turns(value, column))]
    return [Message("user", text_field(value, column))]


def answer_turns(value: Mapping[str, Any], column: str) -> list[Message]:
    """The answer: a text, one turn, or a list of turns.

    Raises:
        RowError: as ``parse``.
    """
    found = value.get(column)
    if isinstance(found, list | dict):
        return parse_turns({column: found if isinstance(found, list) else [found]}, column)
    return [Message("assistant", answer_field(value, column))]


def _fits(columns: set[str], pair: tuple[str, str]) -> bool:
    # An `input` beside an `instruction` belongs to alpaca.
    return columns.issuperset(pair) and not (pair == ("input", "output") and "instruction" in columns)


def _pair(value: Mapping[str, Any]) -> tuple[str, str]:
    """The pair that fits: both names, or else one of them, so that the report names the other as missing."""
    found = {name for name, content in value.items() if content is not None}
    whole = [pair for pair in PAIRS if _fits(found, pair)]
    if len(whole) > 1:
        either = " or ".join(f"`{prompt}` and `{completion}`" for prompt, completion in whole)
        raise RowError("ambiguous", f"{either}: --columns says which, as in --columns prompt=… completion=…")
    return whole[0] if whole else max(PAIRS, key=lambda pair: len(set(value).intersection(pair)))
