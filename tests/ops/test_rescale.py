"""A factor for every column, against the formula in float64."""

import pytest
import torch
from torch import Tensor

from reference.closeness import assert_no_worse
from truetune.ops import dispatch, rescale

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(0, 5), (1, 1), (3, 17), (40, 64), (100, 576), (33, 1000)]


def draws(n: int, m: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """u, dy and a residual [n, m]; factors about 1 [m]."""
    draw = torch.Generator().manual_seed(n * 1000 + m)
    u, g, residual = (torch.randn(n, m, generator=draw).to(dtype) for _ in range(3))
    return u, g, residual, 1 + 0.3 * torch.randn(m, generator=draw)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("beside", ["nothing", "constant", "residual", "both"])
def test_the_product_and_what_is_added_to_it(
    tier: str, dtype: torch.dtype, shape: tuple[int, int], beside: str
) -> None:
    u, _, residual, factor = draws(*shape, dtype)
    extra = {"constant": u.new_ones(shape[1]) / 3, "residual": residual}
    given = {name: value for name, value in extra.items() if beside in (name, "both")}
    by_torch, exact = (
        sum(given.values(), start=u.to(wide) * factor.to(wide)) for wide in (torch.float32, torch.float64)
    )
    product = u.clone()
    y = rescale.scale_(product, factor, **given)
    assert_no_worse(y, by_torch.to(dtype), exact)
    assert_no_worse(product, (u.float() * factor).to(dtype), u.double() * factor.double())
    assert (y is product) == (beside == "nothing")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_added_to_what_is_there(tier: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    u, _, y, factor = draws(*shape, dtype)
    before = u.clone()
    exact = y.double() + u.double() * factor.double()
    by_torch = y + (u.float() * factor).to(dtype)
    assert_no_worse(rescale.add_(y, u, factor), by_torch, exact)
    assert torch.equal(u, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("is_scaled", [True, False])
def test_the_gradients(tier: str, dtype: torch.dtype, shape: tuple[int, int], is_scaled: bool) -> None:
    u, g, _, factor = draws(*shape, dtype)
    product = (u.float() * factor).to(dtype) if is_scaled else u
    exact = (g.double() * product.double()).sum(0) / (factor.double() if is_scaled else 1)
    by_torch = (g * product).sum(0).float() / (factor if is_scaled else 1)
    inner, of_factor = rescale.backward(g, product, factor, is_scaled=is_scaled)
    assert_no_worse(inner, (g.float() * factor).to(dtype), g.double() * factor.double())
    assert of_factor.dtype == torch.float32
    error, allowed = (of_factor - exact).norm(), (by_torch - exact).norm() + 1e-6 * exact.norm()
    assert error <= allowed


def test_a_factor_of_zero_gets_no_gradient_of_what_it_has_wiped_out(tier: str) -> None:
    u, g, _, factor = draws(7, 20, torch.float32)
    factor[3] = 0
    product = rescale.scale_(u, factor)
    _, of_factor = rescale.backward(g, product, factor, is_scaled=True)
    assert of_factor[3] == 0
    assert of_factor.isfinite().all()


def test_threads_change_no_bit(two_threads: None) -> None:
    u, g, _, factor = draws(500, 300, torch.bfloat16)
    found = rescale.backward(g, u, factor, is_scaled=False)
    torch.set_num_threads(1)
    alone = rescale.backward(g, u, factor, is_scaled=False)
    assert all(map(torch.equal, found, alone))


def test_rows_that_are_not_dense_run_in_plain_torch() -> None:
    u, g, _, factor = draws(8, 40, torch.float32)
    with dispatch.forced("reference"):
        expected = rescale.backward(g[:, ::2].contiguous(), u[:, ::2].contiguous(), factor[::2], is_scaled=False)
    found = rescale.backward(g[:, ::2], u[:, ::2], factor[::2], is_scaled=False)
    torch.testing.assert_close(found, expected)
