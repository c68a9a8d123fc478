"""The codebooks hold the values that bitsandbytes' files mean."""

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from truetune.ops import codebooks

GOLDEN = json.loads((Path(__file__).parent / "golden" / "blockwise.json").read_text(encoding="utf-8"))["maps"]


def sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).hexdigest()


def test_nf4_rises_from_minus_one_over_zero_to_one() -> None:
    nf4 = codebooks.four_bit("nf4")
    assert nf4.dtype == torch.float32
    assert bool((nf4.diff() > 0).all())
    assert nf4[[0, 7, 15]].tolist() == [-1.0, 0.0, 1.0]


def test_nf4_values_are_normal_quantiles() -> None:
    """Made as the paper says (appendix E): quantiles of the two halves, scaled so that the last are ±1."""
    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0)
    offset = 0.9677083
    above = normal.icdf(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    below = -normal.icdf(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    expected = torch.cat([above, torch.zeros(1, dtype=torch.float64), below]).sort().values / above.max()
    assert (codebooks.four_bit("nf4").double() - expected).abs().max() < 1e-6


def test_fp4_is_a_float_of_one_sign_two_exponent_and_one_mantissa_bits() -> None:
    subnormal = {0: 0.0, 1: 1 / 192}  # the smallest is an eighth of where the pattern would have it

    def value(code: int) -> float:
        sign, low = -1.0 if code & 8 else 1.0, code & 7
        order = {6: 2, 7: 3, 4: 4, 5: 6, 2: 8, 3: 12}  # by bit pattern, in twelfths
        return sign * (subnormal[low] if low in subnormal else order[low] / 12)

    expected = torch.tensor([value(code) for code in range(16)], dtype=torch.float32)
    assert torch.equal(codebooks.four_bit("fp4"), expected)


@pytest.mark.parametrize("signed", [True, False])
def test_the_dynamic_map_is_golden(signed: bool) -> None:
    assert sha256(codebooks.dynamic(signed=signed)) == GOLDEN["signed" if signed else "unsigned"]


@pytest.mark.parametrize(
    ("signed", "zero", "least", "lowest"), [(True, 127, 5.5e-7, -0.99297), (False, 0, 3.25e-7, 0.0)]
)
def test_the_dynamic_map_spans_seven_decades(signed: bool, zero: int, least: float, lowest: float) -> None:
    values = codebooks.dynamic(signed=signed)
    assert values.shape == (256,)
    assert bool((values.diff() > 0).all())
    assert values[zero] == 0
    assert values[zero + 1].item() == pytest.approx(least)
    assert values[0].item() == pytest.approx(lowest, abs=1e-5)
    assert values[-1] == 1


@pytest.mark.parametrize("signed", [True, False])
def test_the_linear_map_is_golden_and_has_an_exact_zero(signed: bool) -> None:
    values = codebooks.linear(signed=signed)
    assert sha256(values) == GOLDEN["linear_signed" if signed else "linear_unsigned"]
    assert bool((values.diff() >= 0).all())
    assert int((values == 0).sum()) == 1


@pytest.mark.parametrize("n", [300, 4095, 4096, 3 * 4096 + 100])
def test_the_codes_of_a_quantile_map_are_used_equally_often(n: int) -> None:
    x = torch.randn(n, generator=torch.Generator().manual_seed(0)) ** 3
    values = codebooks.quantile(x)
    assert values.shape == (256,)
    assert bool((values.diff() >= 0).all())
    assert bool((values == 0).any())
    assert values.abs().max() == 1
    inside = torch.bucketize(x, torch.quantile(x, torch.tensor([0.25, 0.5, 0.75])))
    codes = torch.bucketize(codebooks.estimate_quantiles(x), torch.quantile(x, torch.tensor([0.25, 0.5, 0.75])))
    assert inside.unique().tolist() == [0, 1, 2, 3]
    # A quarter of the values in each quarter; blocks of 4,096 differ by a standard error of 0.7 % or so.
    assert (codes.bincount() - 64).abs().max() <= 4


def test_quantiles_are_order_statistics_of_blocks() -> None:
    x = torch.randperm(4096, generator=torch.Generator().manual_seed(1)).float()
    expected = [round((1 / 512 + i * (1 - 2 / 512) / 255) * 4095) for i in range(256)]
    assert codebooks.estimate_quantiles(x).tolist() == expected
    twice = torch.cat([x, 2 * x, torch.full((7,), math.inf)])  # what does not fill a block is left out
    assert codebooks.estimate_quantiles(twice).tolist() == [1.5 * i for i in expected]


@pytest.mark.parametrize("x", [torch.zeros(5000), torch.tensor([3.0])], ids=["zeros", "one value"])
def test_a_quantile_map_of_hardly_anything_is_finite(x: Tensor) -> None:
    values = codebooks.quantile(x)
    assert values.isfinite().all()
    assert values.abs().max() <= 1


def test_maps_are_those_of_bitsandbytes() -> None:
    peer = pytest.importorskip("bitsandbytes.functional")
    for kind in ("nf4", "fp4"):
        assert torch.equal(codebooks.four_bit(kind), peer.get_4bit_type(kind, device="cpu"))
    for signed in (True, False):
        assert torch.equal(codebooks.dynamic(signed=signed), peer.create_dynamic_map(signed=signed))
        assert torch.equal(codebooks.linear(signed=signed), peer.create_linear_map(signed=signed))
