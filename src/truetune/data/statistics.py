"""Figures about tokenised examples: how long they are, how much of them is trained, how well they pack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from truetune.data.pack import group
from truetune.data.schema import TokenSet

NEAR_EMPTY = 3  # trained tokens, the stop token counted: an answer of a word or two
_BARS = 14
_ROWS = 1 << 14
_LISTED = 20


@dataclass(frozen=True)
class Bar:
    """One bar of a histogram: ``rows`` examples of ``first`` to ``last`` tokens; the last bar has no end (None)."""

    first: int
    last: int | None
    rows: int

    def __str__(self) -> str:
        return f"{self.first:,}–{self.last:,}" if self.last is not None else f"{self.first:,} and more"


def length_facts(lengths: Tensor) -> dict[str, int]:
    """Least, quartiles, 95th percentile and largest of [rows] lengths: each the length of a real row.

    Raises:
        ValueError: there is no row.
    """
    if not len(lengths):
        raise ValueError("no rows have no lengths")
    ordered = lengths.sort().values
    at = {"min": 0.0, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95, "max": 1.0}
    return {name: int(ordered[round(share * (len(ordered) - 1))]) for name, share in at.items()}


def histogram(lengths: Tensor) -> list[Bar]:
    """At most 14 bars of one width (1, 2 or 5 times a power of ten) from the shortest row to the 98th percentile, and
    one for the rest: few long rows must not press all others into one bar."""
    if not len(lengths):
        return []
    ordered = lengths.sort().values
    least, usual, longest = (int(ordered[round(share * (len(ordered) - 1))]) for share in (0, 0.98, 1))
    reach = longest if longest <= 1.5 * usual else usual
    width = next(w for w in _nice_widths() if reach // w - least // w < _BARS)
    count = reach // width + 1
    tally = torch.bincount((lengths // width).clamp(max=count), minlength=count + 1).tolist()
    bars = [Bar(i * width, (i + 1) * width - 1, tally[i]) for i in range(least // width, count)]
    return [*bars, Bar(count * width, None, tally[count])] if tally[count] else bars


def _nice_widths() -> list[int]:
    return [factor * 10**power for power in range(12) for factor in (1, 2, 5)]


def trained_per_row(examples: TokenSet) -> Tensor:
    """[rows] int64: tokens of each example that carry a loss; the first of an example has no predecessor."""
    counts = torch.zeros(len(examples), dtype=torch.int64)
    for start in range(0, len(examples), _ROWS):  # block by block: the flags may be larger than memory
        edges = examples.offsets[start : start + _ROWS + 1]
        flags = examples.trained[int(edges[0]) : int(edges[-1])].clone()
        flags[edges[:-1][edges.diff() > 0] - edges[0]] = False
        sums = torch.cat([torch.zeros(1, dtype=torch.int64), flags.long().cumsum(0)])
        counts[start : start + _ROWS] = sums[edges - edges[0]].diff()
    return counts


def near_empty(examples: TokenSet) -> list[int]:
    """The examples that train at most three tokens, the stop token counted."""
    found: list[int] = (trained_per_row(examples) <= NEAR_EMPTY).nonzero()[:, 0].tolist()
    return found


def fill_rate(lengths: Sequence[int], budget: int) -> float:
    """Real tokens over the room of the micro-batches that best fit makes of all rows; a row over the budget, which
    stands alone, counts as full."""
    bins = group(lengths, budget, packing=True)
    room = sum(max(budget, sum(lengths[i] for i in members)) for members in bins)
    return sum(lengths) / max(1, room)


def token_facts(examples: TokenSet) -> dict[str, Any]:
    """The figures of one set of examples, as ``truetune preview --json`` gives them.

    Raises:
        ValueError: there is no row.
    """
    empty = near_empty(examples)
    return {
        "rows": len(examples),
        "tokens": len(examples.tokens),
        "trained_tokens": examples.trained_count(),
        "lengths": length_facts(examples.lengths),
        "histogram": [{"from": bar.first, "to": bar.last, "rows": bar.rows} for bar in histogram(examples.lengths)],
        "near_empty": {
            "tokens": NEAR_EMPTY,
            "count": len(empty),
            "rows": [str(examples.origins[i]) for i in empty[:_LISTED]],
        },
    }
