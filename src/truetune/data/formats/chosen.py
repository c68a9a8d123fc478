"""chosen: the better answers of preference data, learned like any answer.

Pairs are `chosen` and `rejected` (texts, turns, or whole conversations that share their start) or `response_j` and
`response_k`, behind a prompt in any of the other formats' columns; a `label` of true or false judges one answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from truetune.data.formats import messages, prompt_completion, sharegpt
from truetune.data.formats.checks import (
    PREFERENCES,
    RowError,
    check_answers,
    expect_object,
    list_fields,
    system_message,
)
from truetune.data.formats.tool_calls import parse_tools
from truetune.data.formats.turns import as_context, parse_turns
from truetune.data.schema import Message, Preference, RawRow, Row

NAME = "chosen"
COLUMNS = "chosen, rejected; or response_j, response_k; or label (true, false) beside an answer"
_PROMPTS = ("prompt", "question", "instruction", "query", "input")


def fits(columns: set[str]) -> bool:
    """Whether a row with these fields is meant to be of this format."""
    return any(columns.issuperset(pair) for pair in PREFERENCES) or "label" in columns


def parse(raw: RawRow) -> Row:
    """The prompt and its better answer.

    Raises:
        RowError: ``worse_answer`` for an answer judged bad alone, and those of ``parse_preference``.
    """
    pair = parse_preference(raw)
    if not pair.chosen:
        raise RowError("worse_answer", "its only answer is judged a bad one")
    turns = (*pair.prompt, *pair.chosen)
    check_answers(turns)
    return Row(raw.origin, messages=turns, tools=pair.tools)


def parse_preference(raw: RawRow) -> Preference:
    """A preference row of any form.

    Raises:
        RowError: ``not_an_object``, ``missing_field``, ``wrong_type``, ``ambiguous``, and those of ``parse_turns``.
    """
    value = expect_object(raw.value)
    pair = next((pair for pair in PREFERENCES if all(column in value for column in pair)), None)
    if pair is None:
        return _judged(raw, value)
    better, worse = (prompt_completion.answer_turns(value, column) for column in pair)
    if better == worse:
        raise RowError("ambiguous", f"`{pair[0]}` and `{pair[1]}` are the same: neither is the better one")
    shared = _shared(better, worse)
    prompt = [*system_message(value), *(better[:shared] or _prompt(value))]
    if not prompt:
        raise RowError("missing_field", f"no prompt stands before the answers; it has {list_fields(value)}")
    answers = tuple(better[shared:]), tuple(worse[shared:])
    return Preference(raw.origin, as_context(prompt), *answers, parse_tools(value))


def _shared(better: Sequence[Message], worse: Sequence[Message]) -> int:
    """How many turns two whole conversations begin with in common; 0 where these are bare answers."""
    if better[0].role == "assistant":
        return 0
    pairs = enumerate(zip(better, worse, strict=False))
    return next((n for n, (one, other) in pairs if one != other), min(len(better) - 1, len(worse)))


def _judged(raw: RawRow, value: Mapping[str, Any]) -> Preference:
    if not isinstance(value.get("label"), bool):
        raise RowError("missing_field", f"no pair of answers and no `label` true or false; it has {list_fields(value)}")
    form = next((form for form in (messages, sharegpt, prompt_completion) if form.fits(set(value))), None)
    if form is None:
        raise RowError("missing_field", f"`label` judges an answer, and none is there; it has {list_fields(value)}")
    row = form.parse(raw)
    *prompt, answer = row.messages
    good, bad = ((answer,), ()) if value["label"] else ((), (answer,))
    return Preference(raw.origin, as_context(prompt), good, bad, row.tools)


def _prompt(value: Mapping[str, Any]) -> list[Message]:
    lists = [column for column in ("messages", *sharegpt.LISTS) if value.get(column) is not None]
    texts = [column for column in _PROMPTS if value.get(column) is not None]
    if lists:
        return parse_turns(value, lists[0])
    return prompt_completion.prompt_turns(value, texts[0]) if texts else []
