"""Figures about tokenised examples, against the plain way of counting."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from truetune.data import token_set
from truetune.data.pack import group
from truetune.data.schema import Origin
from truetune.data.statistics import fill_rate, histogram, length_facts, near_empty, tally, token_facts, trained_per_row
from truetune.data.token_set import TokenSet

flags = st.lists(st.lists(st.booleans(), max_size=12), max_size=20)


class Operations(TorchDispatchMode):
    """Counts what torch is asked to do."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def fill(lengths: list[int], budget: int) -> float:
    return fill_rate(torch.bincount(torch.tensor(lengths, dtype=torch.int64)), budget)


def examples(*rows: list[bool]) -> TokenSet:
    return TokenSet.from_lists([[7] * len(row) for row in rows], rows, [Origin("f", i + 1) for i in range(len(rows))])


@given(rows=flags, block=st.integers(1, 5))
def test_trained_tokens_per_row_add_up_to_those_of_the_set(rows: list[list[bool]], block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_set, "_STRETCH", block)
        counts = trained_per_row(examples(*rows))
    assert counts.tolist() == [sum(row[1:]) for row in rows]
    assert int(counts.sum()) == examples(*rows).trained_count()


@given(lengths=st.lists(st.integers(1, 3000), min_size=1, max_size=200))
def test_every_row_is_in_one_bar_and_few_bars_are_enough(lengths: list[int]) -> None:
    bars = histogram(torch.bincount(torch.tensor(lengths)))
    assert sum(bar.rows for bar in bars) == len(lengths)
    assert len(bars) <= 15
    for bar in bars:
        inside = [n for n in lengths if bar.first <= n and (bar.last is None or n <= bar.last)]
        assert len(inside) == bar.rows
    assert bars[0].rows  # no empty bars in front


def test_one_long_row_does_not_press_the_others_into_one_bar() -> None:
    bars = histogram(torch.bincount(torch.tensor([*range(100, 200), 50_000])))
    assert len([bar for bar in bars if bar.rows]) > 8
    assert (bars[-1].last, bars[-1].rows) == (None, 1)
    assert str(bars[-1]).endswith("and more")


def test_only_the_bars_that_are_shown_are_summed() -> None:
    counts = torch.bincount(torch.tensor([30_000, 30_004, 30_009]))
    with Operations() as seen:
        bars = histogram(counts)
    assert [bar.first for bar in bars if bar.rows] == [30_000, 30_004, 30_009]
    assert seen.count < 100  # thousands where all bars from 0 are


def test_quantiles_are_lengths_of_real_rows() -> None:
    assert length_facts(torch.bincount(torch.tensor([9, 1, 5, 3, 7]))) == {
        "min": 1, "p25": 3, "median": 5, "p75": 7, "p95": 9, "max": 9,
    }  # fmt: skip
    with pytest.raises(ValueError, match="no rows"):
        length_facts(torch.zeros(0, dtype=torch.int64))


def test_near_empty_answers_are_those_of_at_most_three_trained_tokens() -> None:
    data = examples([False, True, True, True], [False] + [True] * 4, [True] * 4, [False] * 9 + [True])
    assert near_empty(data).tolist() == [0, 2, 3]  # of row 3 the first token carries no loss


def test_the_fill_is_real_tokens_over_the_room_of_the_bins() -> None:
    assert fill([60, 40, 50], 100) == 0.75
    assert fill([100, 250], 100) == 1.0  # over the budget: alone, and no larger than itself
    assert fill([], 100) == 0.0


@given(lengths=st.lists(st.integers(1, 40), max_size=80), budget=st.integers(1, 60))
def test_the_fill_is_that_of_the_bins_that_rows_are_grouped_into(lengths: list[int], budget: int) -> None:
    bins = group(lengths, budget, packing=True)
    room = sum(max(budget, sum(lengths[i] for i in members)) for members in bins)
    assert fill(lengths, budget) == sum(lengths) / max(1, room)


@given(rows=flags, block=st.integers(1, 5))
def test_the_tally_counts_each_length(rows: list[list[bool]], block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_set, "_STRETCH", block)
        counts = tally(examples(*rows)).tolist()
    assert [n for n, times in enumerate(counts) for _ in range(times)] == sorted(map(len, rows))


def test_the_facts_name_the_rows_with_near_empty_answers() -> None:
    facts = token_facts(examples([False, True], [False] + [True] * 9))
    assert facts["near_empty"] == {"tokens": 3, "count": 1, "rows": ["f, row 1"]}
    assert (facts["rows"], facts["tokens"], facts["trained_tokens"]) == (2, 12, 10)
