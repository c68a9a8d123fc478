"""Raw text for pre-training: documents in a row, cut into blocks of one length."""

from __future__ import annotations

import torch

from truetune.data.schema import Origin
from truetune.data.token_set import TokenSet

_AT_ONCE = 2048  # blocks that are in memory together, where the documents are in files


def cut_into_blocks(documents: TokenSet, length: int) -> TokenSet:
    """Join documents (each ended by the end token) and cut them into blocks of ``length`` tokens.

    A block starts with the last token of the one before it, as context: so every token but the very first is predicted
    exactly once, and none is dropped.
    """
    total = len(documents.tokens)
    starts = range(0, max(total - 1, 0), length - 1)
    return documents.gathered(
        _cut(documents, starts[first : first + _AT_ONCE], length) for first in range(0, len(starts), _AT_ONCE)
    )


def _cut(documents: TokenSet, starts: range, length: int) -> TokenSet:
    """The blocks that begin at ``starts``."""
    tokens = torch.cat([documents.tokens[start : start + length] for start in starts])
    lengths = torch.tensor([min(length, len(documents.tokens) - start) for start in starts], dtype=torch.int64)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return TokenSet(tokens, torch.ones(len(tokens), dtype=torch.bool), offsets, _origins(documents, starts))


def _origins(documents: TokenSet, starts: range) -> list[Origin]:
    """The document in which each block begins."""
    index = torch.searchsorted(documents.offsets, torch.tensor(starts, dtype=torch.int64), right=True) - 1
    return [documents.origins[min(int(i), len(documents) - 1)] for i in index]
