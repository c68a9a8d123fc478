"""text: one field, learned from the first character to the last; no roles, no template."""

from __future__ import annotations

from truetune.data.formats.checks import RowError, expect_object, text_field
from truetune.data.schema import RawRow, Row

NAME = "text"
COLUMNS = "text"


def fits(columns: set[str]) -> bool:
    """Whether a row with these fields is meant to be of this format."""
    return "text" in columns


def parse(raw: RawRow) -> Row:
    """A row without messages.

    Raises:
        RowError: ``not_an_object``, ``missing_field``, ``wrong_type``, ``empty_text``.
    """
    text = text_field(expect_object(raw.value), "text")
    if not text.strip():
        raise RowError(
            "empty_text", f"`text` {'holds white space only' if text else 'is empty'}: nothing to learn from"
        )
    return Row(raw.origin, text=text)
