"""Held-out rows by a hash of their content: adding rows never moves an old one to the other side."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from truetune.data.schema import Row


def content_hash(row: Row) -> str:
    """SHA-256 of what a row says, whatever file and place it came from."""
    value = {"text": row.text, "tools": list(row.tools), "messages": [(m.role, m.content) for m in row.messages]}
    said = json.dumps(value, sort_keys=True, ensure_ascii=False, default=dict)
    return hashlib.sha256(said.encode(errors="surrogatepass")).hexdigest()  # half a character is content too


def split(rows: Sequence[Row], share: float) -> tuple[list[Row], list[Row]]:
    """``(train, held out)``; equal rows always fall on the same side."""
    train: list[Row] = []
    held_out: list[Row] = []
    for row in rows:
        side = held_out if int(content_hash(row)[:13], 16) < share * 16**13 else train
        side.append(row)
    return train, held_out
