"""Rows that say the same thing twice: worth a warning, no reason to leave one out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from truetune.data.schema import Origin, Row


def duplicates(rows: Sequence[Row]) -> list[tuple[Origin, Origin]]:
    """Each row that repeats an earlier one, with the first row that said it.

    Two rows are the same when their turns, text and tools are; the order of keys in the file and columns that are
    not trained on (an id, a category) play no part.
    """
    first: dict[bytes, Origin] = {}
    found: list[tuple[Origin, Origin]] = []
    for row in rows:
        seen = first.setdefault(_digest(row), row.origin)
        if seen is not row.origin:
            found.append((row.origin, seen))
    return found


def _digest(row: Row) -> bytes:
    """A hash instead of the content itself: a large set must not be held twice."""
    turns = [(message.role, message.content) for message in row.messages]
    content = json.dumps([turns, row.text, row.tools], sort_keys=True, default=str)
    return hashlib.blake2b(content.encode(), digest_size=16).digest()
