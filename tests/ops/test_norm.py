"""RMS norm and layer norm against torch in float64."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from reference.closeness import assert_no_worse
from truetune.ops import norm

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(0, 17), (1, 1), (100, 1), (3, 3), (100, 3), (1, 17), (3, 64), (100, 64), (3, 576), (100, 1000)]


def draws(n: int, h: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, its gradient's source g, what is added, weight and bias."""
    draw = torch.Generator().manual_seed(n * 1000 + h)
    x, g, add = (torch.randn(n, h, generator=draw).to(dtype) for _ in range(3))
    weight, bias = (torch.randn(h, generator=draw).to(dtype) for _ in range(2))
    return x, g, add, weight, bias


def with_gradient(y: Tensor, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    return y.detach(), torch.autograd.grad(y, x, g)[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "h"), SHAPES)
def test_rms_norm_is_no_worse_than_torch(tier: str, n: int, h: int, dtype: torch.dtype) -> None:
    x, g, _, weight, _ = draws(n, h, dtype)
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
@pytest.mark.parametrize(("n", "h"), SHAPES)
def test_layer_norm_is_no_worse_than_torch(tier: str, n: int, h: int, dtype: torch.dtype) -> None:
    x, g, _, weight, bias = draws(n, h, dtype)
    leaf, wide = x.clone().requires_grad_(), x.double().requires_grad_()
    plain, plain_dx = with_gradient(F.layer_norm(leaf, [h], weight, bias, 1e-5), leaf, g)
    truth, truth_dx = with_gradient(F.layer_norm(wide, [h], weight.double(), bias.double(), 1e-5), wide, g.double())
    y, mean, rstd = norm.layer_norm(x, weight, bias, 1e-5)
    assert_no_worse(y, plain, truth)
    torch.testing.assert_close(mean.double(), x.double().mean(-1), atol=1e-6, rtol=1e-6)
    if h > 1:
        assert_no_worse(norm.layer_norm_backward(g, x, weight, mean, rstd), plain_dx, truth_dx)


def test_a_mean_far_from_zero_costs_few_digits(tier: str) -> None:
    x = draws(20, 300, torch.float32)[0] + 100
    y, truth = norm.layer_norm(x, None, None, 1e-5)[0], F.layer_norm(x.double(), [300])
    # The mean has four roundings of 100 at most; the mean square less the squared mean would be off by 1e-3.
    assert (y - truth).abs().max() < 4 * torch.finfo(x.dtype).eps * 100


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_beside_the_norm_is_summed_in_before_rounding(tier: str, dtype: torch.dtype) -> None:
    x, g, add, weight, _ = draws(20, 100, dtype)
    wide = x.double().requires_grad_()
    _, dx = with_gradient(F.rms_norm(wide, [100], weight.double(), 1e-6), wide, g.double())
    _, rstd = norm.rms_norm(x, weight, 1e-6)
    truth = dx + add.double()
    assert_no_worse(norm.rms_norm_backward(g, x, weight, rstd, add=add), truth.to(dtype), truth)
    _, dx = with_gradient(F.layer_norm(wide, [100], weight.double()), wide, g.double())
    _, mean, rstd = norm.layer_norm(x, weight, None, 1e-5)
    truth = dx + add.double()
    assert_no_worse(norm.layer_norm_backward(g, x, weight, mean, rstd, add=add), truth.to(dtype), truth)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gemmas_weight_is_a_distance_from_one(tier: str, dtype: torch.dtype) -> None:
    x, g, _, weight, _ = draws(20, 100, dtype)
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
    x, g, _, weight, bias = draws(20, 100, dtypes[0])
    weight, bias = weight.to(dtypes[1]), bias.to(dtypes[0])
    truth = F.layer_norm(x.double(), [100], weight.double(), bias.double())
    assert_no_worse(norm.layer_norm(x, weight, bias, 1e-5)[0], truth.to(x.dtype), truth)
    wide = x.double().requires_grad_()
    _, dx = with_gradient(F.rms_norm(wide, [100], weight.double(), 1e-6), wide, g.double())
    assert_no_worse(norm.rms_norm_backward(g, x, weight, norm.rms_norm(x, weight, 1e-6)[1]), dx.to(x.dtype), dx)


def test_views_and_more_axes_are_taken_as_they_are(tier: str) -> None:
    x, g, _, weight, _ = draws(24, 64, torch.float32)
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
    x, g, _, weight, bias = draws(4, 50, dtype)
    clean = norm.rms_norm(x, weight, 1e-6)[0]
    x[2, 49] = bad
    y, rstd = norm.rms_norm(x, weight, 1e-6)
    assert y[2].isnan().any()
    assert torch.equal(y[[0, 1, 3]], clean[[0, 1, 3]])
    assert norm.rms_norm_backward(g, x, weight, rstd)[2].isnan().any()
    assert norm.layer_norm(x, weight, bias, 1e-5)[0][2].isnan().all()


def test_results_are_where_the_input_is_whatever_the_default_device(tier: str) -> None:
    x = draws(4, 50, torch.float32)[0]
    with torch.device("meta"):
        y, rstd = norm.rms_norm(x, None, 1e-6)
    assert y.device == rstd.device == x.device
    assert y.isfinite().all()


@pytest.mark.usefixtures("two_threads")
def test_threads_change_no_bit(tier: str) -> None:
    x, g, add, weight, bias = draws(200, 333, torch.bfloat16)

    def run() -> list[Tensor]:
        y, rstd = norm.rms_norm(x, weight, 1e-6)
        z, mean, other = norm.layer_norm(x, weight, bias, 1e-5)
        back = norm.layer_norm_backward(g, x, weight, mean, other, add=add)
        return [y, rstd, z, mean, other, back, norm.rms_norm_backward(g, x, weight, rstd, add=add)]

    two = run()
    torch.set_num_threads(1)
    assert all(map(torch.equal, two, run()))


def test_the_gradients_are_the_derivatives() -> None:
    draw = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(*shape, dtype=torch.float64, generator=draw, requires_grad=True)
        for shape in ((2, 3, 5), (5,), (5,))
    )
    assert torch.autograd.gradcheck(lambda a, b: norm.rms_normed(a, b, 1e-6, offset=1.0), (x, weight))
    assert torch.autograd.gradcheck(lambda a, b, c: norm.layer_normed(a, b, c, 1e-5), (x, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES)
def test_autograd_gives_the_weights_gradient_in_their_own_dtype(tier: str, dtype: torch.dtype) -> None:
    x, g, _, weight, bias = draws(30, 40, dtype)
    leaves = [x.requires_grad_(), weight.float().requires_grad_(), bias.float().requires_grad_()]
    ours = torch.autograd.grad(norm.layer_normed(*leaves, 1e-5), leaves, g)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    truth = torch.autograd.grad(F.layer_norm(wide[0], [40], *wide[1:]), wide, g.double())
    assert [t.dtype for t in ours] == [dtype, torch.float32, torch.float32]
    for found, expected in zip(ours, truth, strict=True):
        assert_no_worse(found, expected.to(found.dtype), expected)


def test_only_what_needs_a_gradient_gets_one(tier: str) -> None:
    x, _, _, weight, _ = draws(3, 4, torch.float32)
    norm.rms_normed(x, weight.requires_grad_(), 1e-6).sum().backward()
    assert weight.grad is not None
    assert x.grad is None
