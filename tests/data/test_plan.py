"""The order of a run as a function of (seed, step)."""

from collections import Counter
from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from truetune.data import plan as plans
from truetune.data.plan import StepPlan, sequential_batches
from truetune.data.schema import Origin
from truetune.data.token_set import TokenSet
from truetune.ops.rng import token_keys


def rows(count: int) -> TokenSet:
    tokens = [[i] * (2 + i % 5) for i in range(count)]
    flags = [[True] * len(ids) for ids in tokens]
    return TokenSet.from_lists(tokens, flags, [Origin("f", i + 1) for i in range(count)])


def plan(count: int, batch: int, epochs: float = 1.0, max_steps: int | None = None, seed: int = 0) -> StepPlan:
    return StepPlan.build(
        rows(count), batch_size=batch, micro_tokens=8, packing=True, seed=seed, epochs=epochs, max_steps=max_steps
    )


def seen(one: StepPlan) -> list[int]:
    return [i for step in range(one.steps) for i in one.examples(step)]


@given(st.integers(1, 30), st.integers(1, 12), st.integers(1, 4))
def test_whole_epochs_see_every_example_the_same_number_of_times(count: int, batch: int, epochs: int) -> None:
    assert Counter(seen(plan(count, batch, epochs))) == dict.fromkeys(range(count), epochs)


@given(st.integers(1, 30), st.integers(1, 12), st.floats(0.01, 3.5))
def test_a_fraction_of_an_epoch_is_that_share_of_the_rows(count: int, batch: int, epochs: float) -> None:
    times = Counter(seen(plan(count, batch, epochs)))
    assert sum(times.values()) == max(1, round(count * epochs))
    assert max(times.values()) - min(times.get(i, 0) for i in range(count)) <= 1


@given(st.integers(1, 30), st.integers(1, 12), st.integers(1, 9))
def test_max_steps_are_full_steps(count: int, batch: int, steps: int) -> None:
    one = plan(count, batch, max_steps=steps)
    assert [len(one.examples(step)) for step in range(one.steps)] == [batch] * steps


def test_the_last_step_takes_what_is_left() -> None:
    one = plan(10, 4, 1.5)
    assert [len(one.examples(step)) for step in range(one.steps)] == [4, 4, 4, 3]


def test_a_batch_larger_than_the_data_reaches_into_the_next_pass() -> None:
    one = plan(3, 8, 3)
    assert one.steps == 2
    assert Counter(one.examples(0)) in [Counter({a: 3, b: 3, c: 2}) for a, b, c in ((0, 1, 2), (0, 2, 1), (1, 2, 0))]
    assert len(one.examples(1)) == 1


def test_a_step_does_not_depend_on_the_steps_before_it() -> None:
    forwards = plan(10, 4, 5)
    backwards = plan(10, 4, 5)
    assert [forwards.examples(s) for s in range(13)] == [backwards.examples(s) for s in reversed(range(13))][::-1]


def test_each_epoch_has_an_order_of_its_own() -> None:
    one = plan(20, 20, 3)
    assert len({tuple(one.examples(step)) for step in range(3)}) == 3


def test_another_seed_is_another_order() -> None:
    assert plan(20, 20).examples(0) != plan(20, 20, seed=1).examples(0)


@pytest.mark.parametrize("packing", [True, False])
def test_evaluation_sees_every_example_once(packing: bool) -> None:
    batches = sequential_batches(rows(17), 8, packing=packing)
    assert sorted(i for batch in batches for i in batch.examples) == list(range(17))


def test_evaluation_makes_a_batch_when_it_is_asked_for() -> None:
    data = rows(17)
    batches = sequential_batches(data, 8, packing=True)
    data.tokens.fill_(3)
    assert all(bool((batch.input_ids == 3).all()) for batch in batches)
    assert [batch.examples for batch in batches[1:3]] == [batches[1].examples, batches[2].examples]


def test_millions_of_rows_are_shuffled_without_a_list() -> None:
    count = (1 << 20) + 1
    tokens = torch.zeros(count, dtype=torch.int32)
    data = TokenSet(tokens, torch.ones(count, dtype=torch.bool), torch.arange(count + 1))
    one = StepPlan.build(data, batch_size=64, micro_tokens=64, packing=True, seed=1, epochs=2, max_steps=None)
    last = count // 64  # the step that reaches into the second pass
    assert one.steps == -(-2 * count // 64)
    seen_twice = [*one.examples(0), *one.examples(last), *one.examples(one.steps - 1)]
    assert all(0 <= i < count for i in seen_twice)
    assert one.examples(last) == StepPlan.build(
        data, batch_size=64, micro_tokens=64, packing=True, seed=1, epochs=2, max_steps=None
    ).examples(last)
    assert len(one.micro_batches(0)) == 1


def keys_by_token(one: StepPlan, step: int) -> dict[tuple[int, int], int]:
    """(example, position) → the key of that token."""
    found: dict[tuple[int, int], int] = {}
    for batch in one.micro_batches(step):
        assert batch.keys is not None
        widths = batch.lengths or [batch.input_ids.shape[1]] * len(batch.examples)
        assert len(batch.keys) == batch.input_ids.numel() == sum(widths)
        for example, keys in zip(batch.examples, batch.keys.split(list(widths)), strict=True):
            length = int(one.data.lengths[example])
            found |= {(example, i): int(key) for i, key in enumerate(keys[:length])}
    return found


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("budget", [1, 7, 12, 1000])
def test_a_token_s_key_depends_on_seed_step_example_and_place_and_on_no_cut(budget: int, packing: bool) -> None:
    one = StepPlan(rows(9), 6, budget, packing, seed=5, steps=3, total=18)
    expected = {
        (example, i): int(key)
        for example in one.examples(2)
        for i, key in enumerate(token_keys(5, 2, [example], [int(one.data.lengths[example])]))
    }
    assert keys_by_token(one, 2) == expected


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_a_budget_that_shrinks_on_the_way_moves_no_key(packing: bool) -> None:
    one = StepPlan(rows(9), 9, 1000, packing, seed=5, steps=3, total=27)
    before = keys_by_token(one, 1)
    one.micro_tokens = 6
    assert keys_by_token(one, 1) == before


def test_each_step_and_each_seed_has_keys_of_its_own() -> None:
    found = [set(keys_by_token(plan(9, 9, 3, seed=seed), step).values()) for seed in (0, 1) for step in range(3)]
    assert len(set.union(*found)) == sum(map(len, found)) == 6 * sum(2 + i % 5 for i in range(9))


@pytest.mark.parametrize("packing", [True, False])
def test_many_rows_to_evaluate_are_grouped_stretch_by_stretch(packing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "_GROUPED", 4)
    batches = sequential_batches(rows(10), 8, packing=packing)
    seen = [batch.examples for batch in batches]
    assert sorted(chain.from_iterable(seen)) == list(range(10))
    assert all(len({i // 4 for i in examples}) == 1 for examples in seen)
    assert [batch.examples for batch in batches[1:3]] == seen[1:3]
    assert batches[-1].examples == seen[-1]
    with pytest.raises(IndexError):
        batches[len(seen)]
    assert len(sequential_batches(rows(0), 8, packing=packing)) == 0


@given(st.lists(st.integers(0, 6), max_size=9), st.lists(st.integers(0, 9), max_size=3), st.data())
def test_ids_in_front_of_every_example_stand_there_and_carry_no_loss(
    lengths: list[int], lead: list[int], data: st.DataObject
) -> None:
    flags = [data.draw(st.lists(st.booleans(), min_size=n, max_size=n)) for n in lengths]
    plain = TokenSet.from_lists([[7] * n for n in lengths], flags, [Origin("f", i + 1) for i in range(len(lengths))])
    found = plain.behind(lead)
    assert found.lengths_of(range(len(lengths))) == found.lengths.tolist() == [len(lead) + n for n in lengths]
    assert found.longest() == (len(lead) + max(lengths) if lengths else 0)
    for i, own in enumerate(flags):
        ids, trained = (column.tolist() for column in found.example(i))
        assert ids == [*lead, *[7] * lengths[i]]
        # The first token of the text has only such ids before it, which know nothing of it.
        assert trained == ([*[False] * (len(lead) + min(1, len(own))), *own[1:]] if lead else own)
    assert found.trained_count() == plain.trained_count()


@pytest.mark.parametrize("packing", [True, False])
def test_evaluation_has_no_keys(packing: bool) -> None:
    assert all(batch.keys is None for batch in sequential_batches(rows(5), 8, packing=packing))


def test_keys_are_whole_numbers_of_64_bits_of_both_signs() -> None:
    (batch,) = StepPlan(rows(9), 9, 1000, True, seed=5, steps=1, total=9).micro_batches(0)
    assert batch.keys is not None
    assert batch.keys.dtype == torch.int64
    assert (batch.keys < 0).any()
    assert (batch.keys > 0).any()
