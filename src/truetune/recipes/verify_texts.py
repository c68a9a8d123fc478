"""Answers that are known by their text alone, as a server's are, beside one whose tokens are known."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

Decode = Callable[[Sequence[int]], str]
"""Tokens as text, without special ones."""


def alike(one: str, other: str) -> bool:
    """Whether two answers are the same text.

    SentencePiece's blank in front of the first word is a part of it or not, by who decodes the answer: one, and on one
    side. Any more are the answer's own, such as the indentation of code.
    """
    return any(mine == theirs for mine, theirs in _laid_beside(one, other))


def _goes_on(text: str, start: str) -> bool:
    """Whether ``text`` begins with ``start``, but for the blank that ``alike`` speaks of."""
    return any(whole.startswith(begun) for whole, begun in _laid_beside(text, start))


def _laid_beside(one: str, other: str) -> tuple[tuple[str, str], ...]:
    """Two texts as they are, and with the blank that either may lack."""
    return (one, other), (f" {one}", other), (one, f" {other}")


def parts_at(own: Sequence[int], ended: bool, text: str, decode: Decode) -> int | None:
    """The place in ``own`` of the first token that ``text`` does not go on with; None where it goes on with all.

    Args:
        ended: whether the last of them is a stop token, which has no text.
    """
    for number in range(1, len(own) + 1):
        so_far = decode(own[:number])
        # A character that is not whole yet is no text to compare.
        if not so_far.endswith("\N{REPLACEMENT CHARACTER}") and not _goes_on(text, so_far):
            return number - 1
    return len(own) - 1 if ended else None


def gap_at(place: int, own: Sequence[int], text: str, likely: tuple[Tensor, Tensor], decode: Decode) -> float:
    """How far the likeliest token that ``text`` can have gone on with is behind the first choice, in nats.

    Args:
        place: where they part, as ``parts_at`` finds it.
        likely: ids and their log-probabilities at that place, both [k], the likeliest first.
    """
    before = decode(own[:place])
    ended = alike(before, text)
    for token, value in zip(*(tensor.tolist() for tensor in likely), strict=True):
        after = decode([*own[:place], token])
        if token != own[place] and (ended if after == before else _goes_on(text, after)):
            return float(likely[1][0]) - float(value)
    return math.inf
