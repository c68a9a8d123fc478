"""Rows that say the same thing twice: worth a warning, no reason to leave one out."""

from __future__ import annotations

from collections.abc import Sequence

from truetune.data.schema import Origin, Row
from truetune.data.split import content_hash


def duplicates(rows: Sequence[Row]) -> list[tuple[Origin, Origin]]:
    """Each row that repeats an earlier one, with the first row that said it.

    Two rows are the same when their turns, text and tools are; the order of keys in the file and columns that are
    not trained on (an id, a category) play no part.
    """
    first: dict[str, Origin] = {}  # by hash: a large set must not be held twice
    found: list[tuple[Origin, Origin]] = []
    for row in rows:
        seen = first.setdefault(content_hash(row), row.origin)
        if seen is not row.origin:
            found.append((row.origin, seen))
    return found


def shared(rows: Sequence[Row], held_out: Sequence[Row]) -> list[Origin]:
    """The held-out rows that are trained on too: a loss measured on them says nothing about new ones."""
    known = {content_hash(row) for row in rows}
    return [row.origin for row in held_out if content_hash(row) in known]
