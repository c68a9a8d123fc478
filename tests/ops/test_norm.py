"""RMS norm against torch in float64."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from reference.closeness import assert_no_worse
from reference.differentiable import joined
from truetune.ops import norm

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(0, 17), (1, 1), (100, 1), (3, 3), (100, 3), (1, 17), (3, 64), (100, 64), (3, 576), (100, 1000)]


def draws(n: int, h: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, the gradient of y, and the weight."""
    draw = torch.Generator().manual_seed(n * 1000 + h)
    x, g = (torch.randn(n, h, generator=draw).to(dtype) for _ in range(2))
    return x, g, torch.randn(h, generator=draw).to(dtype)


def with_gradient(y: Tensor, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    return y.detach(), torch.autograd.grad(y, x, g)[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "h"), SHAPES)
def test_rms_norm_is_no_worse_than_torch(tier: str, n: int, h: int, dtype: torch.dtype) -> None:
    x, g, weight = draws(n, h, dtype)
    leaf, wide = x.clone().requires_grad_(), x.double().requires_grad_()
    plain, plain_dx = with_gradient(F.rms_norm(leaf, [h], weight, 1e-6), leaf, g)
    truth, truth_dx = with_gradient(F.rms_norm(wide, [h], weight.double(), 1e-6), wide, g.double())
    y, rstd = norm.rms_norm(x, weight, 1e-6)
    assert_no_worse(y, plain, truth)
    assert rstd.dtype == torch.float32
    torch.testing.assert_close(rstd.double(), (x.double().square().mean(-1) + 1e-6).rsqrt(), atol=0, rtol=1e-6)
    if h > 1:  # of one value the gradient is all but zero: a difference of equal terms
        assert_no_worse(norm.rms_norm_backward(g, x, weight, rstd), plain_dx, truth_dx)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gemmas_weight_is_a_distance_from_one(tier: str, dtype: torch.dtype) -> None:
    x, g, weight = draws(20, 100, dtype)
    wide = x.double().requires_grad_()
    truth, dx = with_gradient(F.rms_norm(wide, [100], 1 + weight.double(), 1e-6), wide, g.double())
    y, rstd = norm.rms_norm(x, weight, 1e-6, offset=1.0)
    assert_no_worse(y, truth.to(dtype), truth)
    assert_no_worse(norm.rms_norm_backward(g, x, weight, rstd, offset=1.0), dx.to(dtype), dx)


def test_without_a_weight_there_is_no_factor(tier: str) -> None:
    x = draws(20, 100, torch.float32)[0]
    y, rstd = norm.rms_norm(x, None, 1e-6, offset=1.0)
    torch.testing.assert_close(y, F.rms_norm(x, [100], None, 1e-6))
    ones = torch.ones(100)
    assert torch.equal(norm.rms_norm_backward(x, x, None, rstd), norm.rms_norm_backward(x, x, ones, rstd))


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
def test_the_weight_may_be_of_another_dtype(tier: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    x, g, weight = draws(20, 100, dtypes[0])
    weight = weight.to(dtypes[1])
    wide = x.double().requires_grad_()
    truth, dx = with_gradient(F.rms_norm(wide, [100], weight.double(), 1e-6), wide, g.double())
    y, rstd = norm.rms_norm(x, weight, 1e-6)
    assert_no_worse(y, truth.to(x.dtype), truth)
    assert_no_worse(norm.rms_norm_backward(g, x, weight, rstd), dx.to(x.dtype), dx)


def test_views_and_more_axes_are_taken_as_they_are(tier: str) -> None:
    x, g, weight = draws(24, 64, torch.float32)
    y, rstd = norm.rms_norm(x, weight, 1e-6)
    folded, folded_rstd = norm.rms_norm(x.view(2, 3, 4, 64), weight, 1e-6)
    assert torch.equal(folded.view(24, 64), y)
    assert torch.equal(folded_rstd, rstd)
    wider = torch.cat((x, x), 1)[:, :64]  # rows 128 apart
    assert torch.equal(norm.rms_norm(wider, weight, 1e-6)[0], y)
    dx = norm.rms_norm_backward(g.T.contiguous().T, wider, weight, rstd)
    torch.testing.assert_close(dx, norm.rms_norm_backward(g, x, weight, rstd))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_spoils_its_row_alone(tier: str, bad: float, dtype: torch.dtype) -> None:
    x, g, weight = draws(4, 50, dtype)
    clean = norm.rms_norm(x, weight, 1e-6)[0]
    x[2, 49] = bad
    y, rstd = norm.rms_norm(x, weight, 1e-6)
    assert y[2].isnan().any()
    assert torch.equal(y[[0, 1, 3]], clean[[0, 1, 3]])
    assert norm.rms_norm_backward(g, x, weight, rstd)[2].isnan().any()


def test_results_are_where_the_input_is_whatever_the_default_device(tier: str) -> None:
    x = draws(4, 50, torch.float32)[0]
    with torch.device("meta"):
        y, rstd = norm.rms_norm(x, None, 1e-6)
    assert y.device == rstd.device == x.device
    assert y.isfinite().all()


@pytest.mark.usefixtures("two_threads")
def test_threads_change_no_bit(tier: str) -> None:
    x, g, weight = draws(200, 333, torch.bfloat16)

    def run() -> list[Tensor]:
        y, rstd = norm.rms_norm(x, weight, 1e-6)
        return [y, rstd, norm.rms_norm_backward(g, x, weight, rstd)]

    two = run()
    torch.set_num_threads(1)
    assert all(map(torch.equal, two, run()))


def test_the_gradient_is_the_derivative() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, dtype=torch.float64, generator=draw, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, generator=draw)

    def forward(x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        y, rstd = norm.rms_norm(x, weight, 1e-6, offset=1.0)
        return y, (x, rstd)

    def backward(g: Tensor, x: Tensor, rstd: Tensor) -> tuple[Tensor, ...]:
        return (norm.rms_norm_backward(g, x, weight, rstd, offset=1.0),)

    assert torch.autograd.gradcheck(joined(forward, backward), (x,))
