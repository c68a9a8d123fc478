"""Which examples share a row, and the tensors made of them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from truetune.data.pack import collate, group
from truetune.data.schema import Origin
from truetune.data.token_set import TokenSet

lengths = st.lists(st.integers(1, 50), max_size=60)
both = pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])


def examples(*sizes: int, prompt: int = 1) -> TokenSet:
    tokens = [[100 * row + i for i in range(n)] for row, n in enumerate(sizes)]
    flags = [[i >= prompt for i in range(n)] for n in sizes]
    return TokenSet.from_lists(tokens, flags, [Origin("f", i + 1) for i in range(len(sizes))])


@both
@given(sizes=lengths, budget=st.integers(1, 120))
def test_every_example_is_in_one_bin_once(packing: bool, sizes: list[int], budget: int) -> None:
    bins = group(sizes, budget, packing=packing)
    assert sorted(i for members in bins for i in members) == list(range(len(sizes)))


@both
@given(sizes=lengths, budget=st.integers(1, 120))
def test_no_bin_is_over_the_budget_unless_it_is_one_example(packing: bool, sizes: list[int], budget: int) -> None:
    for members in group(sizes, budget, packing=packing):
        cost = sum(sizes[i] for i in members) if packing else max(sizes[i] for i in members) * len(members)
        assert cost <= budget or len(members) == 1


@given(sizes=lengths, budget=st.integers(50, 120))
def test_best_fit_leaves_no_two_bins_that_fit_in_one(sizes: list[int], budget: int) -> None:
    totals = sorted(sum(sizes[i] for i in members) for members in group(sizes, budget, packing=True))
    assert len(totals) < 2 or totals[0] + totals[1] > budget


@given(sizes=lengths, budget=st.integers(1, 120))
def test_best_fit_takes_the_tightest_bin(sizes: list[int], budget: int) -> None:
    slow: list[list[int]] = []
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        rooms = [(budget - sum(sizes[j] for j in members), b) for b, members in enumerate(slow)]
        fitting = sorted((room, b) for room, b in rooms if room >= sizes[i])
        if fitting:
            slow[fitting[0][1]].append(i)
        else:
            slow.append([i])
    assert group(sizes, budget, packing=True) == slow


def test_grouping_a_hundred_thousand_rows_takes_no_minutes() -> None:
    sizes = [1 + (i * 7919) % 300 for i in range(100_000)]
    assert len(group(sizes, 2048, packing=True)) >= sum(sizes) / 2048  # quadratic best fit would need 10^9 steps


def test_a_packed_row_holds_the_examples_end_to_end() -> None:
    batch = collate(examples(3, 2, 4), [2, 0], packing=True)
    assert batch.input_ids.tolist() == [[200, 201, 202, 203, 0, 1, 2]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert batch.lengths == (4, 3)
    assert batch.attention_mask is None
    assert batch.tokens == 7


def test_a_padded_batch_has_one_example_a_row() -> None:
    batch = collate(examples(3, 2), [0, 1], packing=False)
    assert batch.input_ids.tolist() == [[0, 1, 2], [100, 101, 0]]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.tokens == 5


@both
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6), prompt=st.integers(0, 9))
def test_what_is_predicted_is_every_trained_token_but_an_example_s_first(
    packing: bool, sizes: list[int], prompt: int
) -> None:
    data = examples(*sizes, prompt=prompt)
    batch = collate(data, range(len(sizes)), packing=packing)
    expected = [100 * row + i for row, n in enumerate(sizes) for i in range(1, n) if i >= prompt]
    assert batch.targets.tolist() == expected
    assert batch.trained == len(expected) == data.trained_count()


@both
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6), prompt=st.integers(0, 9))
def test_each_target_is_read_where_its_predecessor_stands(packing: bool, sizes: list[int], prompt: int) -> None:
    batch = collate(examples(*sizes, prompt=prompt), range(len(sizes)), packing=packing)
    rows = batch.input_ids[:, batch.columns].flatten() if len(batch.columns) else torch.zeros(0)
    assert (rows[batch.picks] + 1).tolist() == batch.targets.tolist()  # ids count up within an example
