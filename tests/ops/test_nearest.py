"""Ranks among thresholds are exact, for every float there is."""

import pytest
import torch
from torch import Tensor

from truetune.ops import codebooks, nearest

CPU = torch.device("cpu")
SPECIAL = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-38, 1.0, -1.0, 3.4e38, -3.4e38, torch.inf, -torch.inf])


def floats() -> Tensor:
    """Special ones, and a million with any bits but those of a NaN."""
    bits = torch.randint(-(2**31), 2**31, (1 << 20,), generator=torch.Generator().manual_seed(0))
    any_bits = bits.to(torch.int32).view(torch.float32)
    return torch.cat([SPECIAL, any_bits[~any_bits.isnan()], torch.linspace(-1.1, 1.1, 100_001)])


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bit_ranks_count_the_thresholds_below(kind: codebooks.Kind4) -> None:
    search, x = nearest.of_kind(kind, CPU), floats()
    around = search.thresholds[:-1]
    x = torch.cat([x, *(around.nextafter(around + step) for step in (-1, 1)), around])
    assert search.steps == 1
    assert torch.equal(search.ranks(x), torch.bucketize(x, around, out_int32=True))


@pytest.mark.parametrize("code", [codebooks.dynamic(), codebooks.dynamic(signed=False), codebooks.linear(signed=False)])
def test_one_comparison_does_for_the_maps_in_use(code: Tensor) -> None:
    search, x = nearest.of_code(code, CPU), floats()
    assert search.steps == 1
    assert torch.equal(search.ranks(x), torch.bucketize(x, (code[1:] + code[:-1]) / 2, out_int32=True))


def test_a_map_with_crowded_values_takes_more_and_is_exact_too() -> None:
    code = torch.cat([torch.zeros(200), torch.linspace(0.5, 0.501, 56)])
    search, x = nearest.of_code(code, CPU), torch.cat([floats(), torch.linspace(0.499, 0.502, 10_000)])
    assert search.steps == 199  # all lie at zero
    assert torch.equal(search.ranks(x), torch.bucketize(x, (code[1:] + code[:-1]) / 2, out_int32=True))


def test_not_a_number_still_has_a_rank_that_is_one() -> None:
    search = nearest.of_code(codebooks.dynamic(), CPU)
    assert search.ranks(torch.tensor([torch.nan, -torch.nan])).min() >= 0
    assert search.ranks(torch.tensor([torch.nan, -torch.nan])).max() <= 255


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_ranks_in_order_are_codes_in_order_of_value(kind: codebooks.Kind4) -> None:
    order = nearest.order(kind, CPU)
    codes = torch.arange(16) if order is None else order.long()[torch.arange(16) * 17] & 15
    assert sorted(codes.tolist()) == list(range(16))
    assert bool((codebooks.four_bit(kind)[codes].diff() >= 0).all())
