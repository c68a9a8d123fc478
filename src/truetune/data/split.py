"""Held-out rows by a hash of their content: adding rows never moves an old one to the other side."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from truetune.data.schema import Message, Row


def content_hash(row: Row) -> str:
    """SHA-256 of what a row says, whatever file and place it came from."""
    value = {"text": row.text, "tools": list(row.tools), "messages": [_said(message) for message in row.messages]}
    said = json.dumps(value, sort_keys=True, ensure_ascii=False, default=dict)
    return hashlib.sha256(said.encode(errors="surrogatepass")).hexdigest()  # half a character is content too


def _said(message: Message) -> tuple[Any, ...]:
    plain = (message.role, message.content)
    return (*plain, message.reasoning, list(message.tool_calls)) if message.reasoning or message.tool_calls else plain


def content_key(row: Row) -> int:
    """The first 64 bits of ``content_hash``, as a signed integer: what an array can hold of many rows.

    Among ten million rows, two that differ share a key with a chance of 1 in 370,000.
    """
    return int.from_bytes(bytes.fromhex(content_hash(row)[:16]), "big", signed=True)


def held_out(keys: Tensor, share: float) -> Tensor:
    """[n] bool: which rows are held out, by their keys ([n] int64); equal rows always fall on the same side."""
    # The upper 52 of the 64 bits, which a float compares exactly.
    return ((keys >> 12) & (16**13 - 1)).double() < share * 16**13


def split(rows: Sequence[Row], share: float) -> tuple[list[Row], list[Row]]:
    """``(train, held out)``."""
    sides = held_out(torch.tensor([content_key(row) for row in rows], dtype=torch.int64), share).tolist()
    train = [row for row, held in zip(rows, sides, strict=True) if not held]
    return train, [row for row, held in zip(rows, sides, strict=True) if held]
