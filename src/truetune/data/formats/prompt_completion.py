"""prompt-completion: two texts, of which the second is learned. Several pairs of names are in use."""

from __future__ import annotations

from collections.abc import Iterable

from truetune.data.formats.checks import answer_field, expect_object, text_field
from truetune.data.schema import Message, RawRow, Row

NAME = "prompt-completion"
PAIRS = (("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("text", "code"))
COLUMNS = "; or ".join(f"{prompt}, {completion}" for prompt, completion in PAIRS)


def fits(columns: set[str]) -> bool:
    """Whether a row with these fields is meant to be of this format."""
    return any(columns.issuperset(pair) for pair in PAIRS)


def parse(raw: RawRow) -> Row:
    """A conversation of one question and one answer, both byte for byte.

    Raises:
        RowError: ``not_an_object``, ``missing_field``, ``wrong_type``, ``empty_output``.
    """
    value = expect_object(raw.value)
    prompt, completion = _pair(value)
    chat = "a list of turns belongs into `messages`" if isinstance(value.get(prompt), list) else ""
    question = text_field(value, prompt, hint=chat)
    return Row(raw.origin, messages=(Message("user", question), Message("assistant", answer_field(value, completion))))


def _pair(columns: Iterable[str]) -> tuple[str, str]:
    """The pair that fits best: both names, or else one of them, so that the report names the other as missing."""
    found = set(columns)
    return max(PAIRS, key=lambda pair: len(found.intersection(pair)))
