"""Finite or not, in every dtype that a file may hold."""

import pytest
import torch

from truetune.ops.finite import are_finite

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_one_nan_is_seen(dtype: torch.dtype) -> None:
    values = torch.full((40,), 3.0)
    assert are_finite(values.to(dtype))
    values[17] = float("nan")
    assert not are_finite(values.to(dtype))


@pytest.mark.parametrize("dtype", FLOATS[:4], ids=str)
def test_infinity_is_seen_and_a_sum_that_overflows_is_none(dtype: torch.dtype) -> None:
    largest = torch.full((40,), torch.finfo(dtype).max, dtype=dtype)
    assert are_finite(largest)
    largest[3] = float("-inf")
    assert not are_finite(largest)


def test_integers_are_numbers() -> None:
    assert are_finite(torch.tensor([1, 2]))
    assert are_finite(torch.empty(0))
