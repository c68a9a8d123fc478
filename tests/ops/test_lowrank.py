"""The low-rank update against its formula in float64."""

import math

import pytest
import torch
from torch import Tensor

from truetune.ops import dispatch, lowrank


def factors(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return tuple(torch.randn(*shape, generator=draw).to(dtype) for shape in ((3, 5, 12), (4, 12), (7, 4)))  # type: ignore[return-value]


def test_linear_is_s_b_a_x() -> None:
    x, a, b = factors()
    truth = 0.5 * torch.einsum("or,ri,bti->bto", b.double(), a.double(), x.double())
    torch.testing.assert_close(lowrank.linear(x, a, b, 0.5).double(), truth, atol=1e-5, rtol=1e-5)


def test_linear_has_the_gradient_of_its_formula() -> None:
    x, a, b = (t.requires_grad_() for t in factors(torch.float64))
    assert torch.autograd.gradcheck(lambda *args: lowrank.linear(*args, 0.7), (x, a, b))


def test_lookup_is_the_column_of_the_product() -> None:
    _, a, b = factors()
    ids = torch.tensor([[3, 3], [0, 11]])
    truth = (0.5 * (b.double() @ a.double()))[:, ids.flatten()].T.view(2, 2, 7)
    torch.testing.assert_close(
        lowrank.lookup(ids, a, b, 0.5, dtype=torch.float32).double(), truth, atol=1e-5, rtol=1e-5
    )


def test_fold_is_what_linear_adds() -> None:
    x, a, b = factors(torch.float64)
    weight = torch.randn(7, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    folded = lowrank.fold(weight, a, b, 0.5)
    torch.testing.assert_close(x @ folded.T, x @ weight.T + lowrank.linear(x, a, b, 0.5), atol=1e-12, rtol=1e-12)


def test_fold_rounds_once_in_bfloat16() -> None:
    _, a, b = factors()
    weight = torch.randn(7, 12, generator=torch.Generator().manual_seed(1)).bfloat16()
    truth = (weight.double() + 0.5 * (b.double() @ a.double())).bfloat16()
    assert torch.equal(lowrank.fold(weight, a, b, 0.5), truth)


def test_fold_leaves_the_weight_untouched() -> None:
    _, a, b = factors()
    weight = torch.zeros(7, 12)
    lowrank.fold(weight, a, b, 1.0)
    assert torch.equal(weight, torch.zeros(7, 12))


@pytest.mark.parametrize(("stabilised", "expected"), [(False, 32 / 9), (True, 32 / 3)])
def test_scale_divides_by_the_rank_or_its_root(stabilised: bool, expected: float) -> None:
    assert math.isclose(lowrank.scale(32, 9, rank_stabilised=stabilised), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 5), (600, 1031), (3, lowrank._CACHED + 1), (0, 4)])
def test_fold_by_rows_is_the_whole_sum_to_the_bit(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """More rows than are merged at once, rows that are longer than that, and none."""
    draw = torch.Generator().manual_seed(2)
    weight = torch.randn(shape, generator=draw).to(dtype)
    a, b = torch.randn(4, shape[1], generator=draw), torch.randn(shape[0], 4, generator=draw)
    whole = torch.add(weight.float(), b @ a, alpha=0.37).to(dtype)
    for stored in (weight, weight.T.contiguous().T):
        with dispatch.forced("reference"):
            folded = lowrank.fold(stored, a.requires_grad_(), b, 0.37)
        assert folded.is_contiguous()
        assert torch.equal(folded, whole)
