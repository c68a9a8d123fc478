"""Figures about tokenised examples: how long they are, how much of them is trained, how well they pack."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from truetune.data.pack import bins_needed
from truetune.data.token_set import TokenSet

NEAR_EMPTY = 3  # trained tokens, the stop token counted: an answer of a word or two
_BARS = 14
_LISTED = 20


@dataclass(frozen=True)
class Bar:
    """One bar of a histogram: ``rows`` examples of ``first`` to ``last`` tokens; the last bar has no end (None)."""

    first: int
    last: int | None
    rows: int

    def __str__(self) -> str:
        return f"{self.first:,}–{self.last:,}" if self.last is not None else f"{self.first:,} and more"


def tally(examples: TokenSet) -> Tensor:
    """[longest + 1] int64: how many examples have each length; all that is asked about lengths is told by it."""
    counts = torch.zeros(examples.longest() + 1, dtype=torch.int64)
    for part in examples.stretches():
        counts += torch.bincount(part.lengths, minlength=len(counts))
    return counts


def length_facts(counts: Tensor) -> dict[str, int]:
    """Least, quartiles, 95th percentile and largest of the lengths counted by ``tally``: each that of a real row.

    Raises:
        ValueError: there is no row.
    """
    if not counts.any():
        raise ValueError("no rows have no lengths")
    at = {"min": 0.0, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95, "max": 1.0}
    return dict(zip(at, _quantiles(counts, at.values()), strict=True))


def _quantiles(counts: Tensor, shares: Iterable[float]) -> list[int]:
    """The lengths that stand at these shares of the rows, ordered by length."""
    upto = counts.cumsum(0)
    places = torch.tensor([round(share * (int(upto[-1]) - 1)) for share in shares], dtype=torch.int64)
    found: list[int] = torch.searchsorted(upto, places, right=True).tolist()
    return found


def histogram(counts: Tensor) -> list[Bar]:
    """The lengths counted by ``tally``: at most 14 bars of one width (1, 2 or 5 times a power of ten) from the shortest
    row to the 98th percentile, and one for the rest: few long rows must not press all others into one bar."""
    if not counts.any():
        return []
    least, usual, longest = _quantiles(counts, (0, 0.98, 1))
    reach = longest if longest <= 1.5 * usual else usual
    width = next(w for w in _nice_widths() if reach // w - least // w < _BARS)
    end = reach // width + 1
    places = range(least // width, end)
    bars = [Bar(i * width, (i + 1) * width - 1, int(counts[i * width : (i + 1) * width].sum())) for i in places]
    rest = int(counts[end * width :].sum())
    return [*bars, Bar(end * width, None, rest)] if rest else bars


def _nice_widths() -> list[int]:
    return [factor * 10**power for power in range(12) for factor in (1, 2, 5)]


def trained_per_row(examples: TokenSet) -> Tensor:
    """[rows] int32: tokens of each example that carry a loss; the first of an example has no predecessor."""
    counts = torch.zeros(len(examples), dtype=torch.int32)
    before = 0
    for part in examples.stretches():
        edges, flags = part.offsets, part.trained.clone()
        flags[edges[:-1][edges.diff() > 0]] = False
        sums = torch.cat([torch.zeros(1, dtype=torch.int64), flags.long().cumsum(0)])
        counts[before : before + len(part)] = sums[edges].diff()
        before += len(part)
    return counts


def near_empty(examples: TokenSet) -> Tensor:
    """[m] int64: the examples that train at most three tokens, the stop token counted."""
    return (trained_per_row(examples) <= NEAR_EMPTY).nonzero()[:, 0]


def fill_rate(counts: Tensor, budget: int) -> float:
    """Real tokens over the room of the micro-batches that best fit makes of all rows; a row over the budget, which
    stands alone, counts as full.

    Args:
        counts: the rows' lengths, by ``tally``.
    """
    rows: list[tuple[int, int]] = [(length, int(counts[length])) for length in counts.nonzero()[:, 0].tolist()]
    tokens = sum(length * count for length, count in rows)
    alone = sum(length * count for length, count in rows if length > budget)
    return tokens / max(1, alone + budget * bins_needed([row for row in rows if row[0] <= budget], budget))


def token_facts(examples: TokenSet) -> dict[str, Any]:
    """The figures of one set of examples, as ``truetune preview --json`` gives them.

    Raises:
        ValueError: there is no row.
    """
    empty, counts = near_empty(examples), tally(examples)
    return {
        "rows": len(examples),
        "tokens": len(examples.tokens),
        "trained_tokens": examples.trained_count(),
        "lengths": length_facts(counts),
        "histogram": [{"from": bar.first, "to": bar.last, "rows": bar.rows} for bar in histogram(counts)],
        "near_empty": {
            "tokens": NEAR_EMPTY,
            "count": len(empty),
            "rows": [str(examples.origins[i]) for i in empty[:_LISTED].tolist()],
        },
    }
