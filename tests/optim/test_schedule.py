"""Learning rates as functions of the step."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from truetune.optim.schedule import Schedule, warmup_steps

SHAPES = ("cosine", "linear", "constant")


@pytest.mark.parametrize("shape", SHAPES)
def test_the_warm_up_climbs_evenly_and_starts_above_zero(shape: str) -> None:
    rates = [Schedule(4.0, 100, 4, shape).at(step) for step in range(5)]  # type: ignore[arg-type]
    assert rates == [1.0, 2.0, 3.0, 4.0, 4.0]


def test_linear_falls_by_the_same_amount_each_step() -> None:
    assert [Schedule(5.0, 5, 0, "linear").at(step) for step in range(5)] == pytest.approx([5, 4, 3, 2, 1])


def test_cosine_is_half_way_down_in_the_middle() -> None:
    schedule = Schedule(2.0, 100, 0, "cosine")
    assert schedule.at(0) == 2.0
    assert schedule.at(50) == pytest.approx(1.0)
    assert schedule.at(99) == pytest.approx(1 + math.cos(math.pi * 0.99))


def test_constant_stays() -> None:
    assert {Schedule(2.0, 100, 10, "constant").at(step) for step in range(10, 100)} == {2.0}


@given(st.integers(1, 400), st.floats(0, 500), st.sampled_from(SHAPES))
def test_every_step_learns_and_none_more_than_the_peak(total: int, warmup: float, shape: str) -> None:
    schedule = Schedule(1e-3, total, warmup_steps(warmup, total), shape)  # type: ignore[arg-type]
    assert all(0 < schedule.at(step) <= 1e-3 for step in range(total))


@given(st.integers(1, 400), st.floats(0, 500))
def test_the_peak_is_reached(total: int, warmup: float) -> None:
    schedule = Schedule(1e-3, total, warmup_steps(warmup, total))
    assert max(schedule.at(step) for step in range(total)) == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("setting", "total", "expected"),
    [(0, 100, 0), (0.03, 100, 3), (0.07, 100, 7), (0.03, 10, 1), (0.5, 1, 0), (1, 1, 0), (1, 10, 1), (50, 10, 9),
     (0.999, 10, 9), (20, 100, 20), (1e-9, 100, 0)],
)  # fmt: skip
def test_warm_up_is_a_share_or_a_count_and_never_the_whole_run(setting: float, total: int, expected: int) -> None:
    assert warmup_steps(setting, total) == expected
