"""text: one field, learned from the first character to the last; no roles, no template."""

from __future__ import annotations

from truetune.data.formats.checks import RowError, expect_object, is_blank, text_field
from truetune.data.schema import RawRow, Row

NAME = "text"
FIELDS = ("text", "content", "quote")
COLUMNS = "; or ".join(FIELDS)


def fits(columns: set[str]) -> bool:
    """Whether a row with these fields is meant to be of this format."""
    return not columns.isdisjoint(FIELDS)


def parse(raw: RawRow) -> Row:
    """A row without messages.

    Raises:
        RowError: ``not_an_object``, ``missing_field``, ``wrong_type``, ``empty_text``, ``ambiguous``.
    """
    value = expect_object(raw.value)
    there = [name for name in FIELDS if value.get(name) is not None] or [n for n in FIELDS if n in value] or ["text"]
    if len(there) > 1:
        either = " or ".join(f"`{name}`" for name in there)
        raise RowError("ambiguous", f"{either}: --columns says which is the text, as in --columns text={there[1]}")
    text = text_field(value, there[0])
    if is_blank(text):
        found = "holds white space only" if text else "is empty"
        raise RowError("empty_text", f"`{there[0]}` {found}: nothing to learn from")
    return Row(raw.origin, text=text)
