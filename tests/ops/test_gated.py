"""Gated activations against torch in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from reference.closeness import assert_no_worse
from reference.differentiable import joined
from truetune.errors import ConfigError
from truetune.ops.gated import gated, gated_backward

DTYPES = [torch.float32, torch.bfloat16]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def draws(n: int, i: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """g, gate (spread widely, to reach both tails) and up."""
    draw = torch.Generator().manual_seed(n * 1000 + i)
    g, gate, up = (torch.randn(n, i, generator=draw) for _ in range(3))
    return g.to(dtype), (4 * gate).to(dtype), up.to(dtype)


def plainly(kind: str, g: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
    """The result and both gradients by torch, in the dtype that is given."""
    leaves = gate.clone().requires_grad_(), up.clone().requires_grad_()
    y = ACTIVATIONS[kind](leaves[0]) * leaves[1]
    return y.detach(), *torch.autograd.grad(y, leaves, g)


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (1, 17), (3, 3), (3, 64), (100, 576), (7, 1000)], ids=str)
def test_no_worse_than_torch(tier: str, kind: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    g, gate, up = draws(*shape, dtype)
    plain, truth = plainly(kind, g, gate, up), plainly(kind, g.double(), gate.double(), up.double())
    ours = gated(gate, up, kind), *gated_backward(g, gate, up, kind)
    for found, by_torch, expected in zip(ours, plain, truth, strict=True):
        assert_no_worse(found, by_torch, expected)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_float32_is_right_to_a_millionth_all_along_the_line(tier: str, kind: str) -> None:
    gate = torch.linspace(-100, 100, 20011)[None]
    one = torch.ones_like(gate)
    truth = plainly(kind, one.double(), gate.double(), one.double())
    ours = gated(gate, one, kind), *gated_backward(one, gate, one, kind)
    for found, expected in zip(ours, truth, strict=True):
        torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_slices_of_one_buffer_are_read_and_written_where_they_are(tier: str, dtype: torch.dtype) -> None:
    g, gate, up = draws(9, 40, dtype)
    fused = torch.cat((gate, up), 1)
    y, d = gated(gate, up, "silu"), gated_backward(g, gate, up, "silu")
    halves = fused[:, :40], fused[:, 40:]
    torch.testing.assert_close(gated(*halves, "silu"), y)
    out = gated_backward(g, *halves, "silu", out=halves)
    assert out[0] is halves[0]
    torch.testing.assert_close(fused, torch.cat(d, 1))


def test_the_result_may_take_the_place_of_an_input(tier: str) -> None:
    _, gate, up = draws(9, 40, torch.bfloat16)
    y = gated(gate, up, "gelu")
    assert gated(gate, up, "gelu", out=up) is up
    assert torch.equal(up, y)


def test_columns_that_are_not_dense_are_taken_too(tier: str) -> None:
    g, gate, up = draws(9, 40, torch.float32)
    truth = gated_backward(g, gate, up, "silu")
    turned = [t.T.contiguous().T for t in (g, gate, up)]
    for found, expected in zip(gated_backward(*turned, "silu"), truth, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_so_and_touches_nothing_else(tier: str, kind: str, dtype: torch.dtype) -> None:
    g, gate, up = draws(2, 50, dtype)
    clean = gated(gate, up, kind)
    gate[0, 7], gate[0, 49], up[1, 3] = float("nan"), float("inf"), float("nan")
    y, (d_gate, d_up) = gated(gate, up, kind), gated_backward(g, gate, up, kind)
    bad = torch.zeros(2, 50, dtype=torch.bool)
    bad[0, 7] = bad[0, 49] = bad[1, 3] = True
    assert torch.equal(~y.isfinite(), bad)
    assert torch.equal(y[~bad], clean[~bad])
    assert d_gate[0, 7].isnan() == (kind != "relu")  # the slope of relu at NaN is 1, as torch has it
    assert d_gate[1, 3].isnan()
    assert d_up[0, 7].isnan()


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_threads_change_no_bit(tier: str, kind: str) -> None:
    g, gate, up = draws(200, 333, torch.bfloat16)
    two = gated(gate, up, kind), *gated_backward(g, gate, up, kind)
    torch.set_num_threads(1)
    assert all(map(torch.equal, two, (gated(gate, up, kind), *gated_backward(g, gate, up, kind))))


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_the_gradients_are_the_derivatives(kind: str) -> None:
    draw = torch.Generator().manual_seed(0)
    leaves = [torch.randn(6, 4, dtype=torch.float64, generator=draw, requires_grad=True) for _ in range(2)]

    def forward(gate: Tensor, up: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return gated(gate, up, kind), (gate, up)

    def backward(g: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
        return gated_backward(g, gate, up, kind)

    assert torch.autograd.gradcheck(joined(forward, backward), leaves)


def test_another_kind_is_refused_with_the_nearest() -> None:
    x = torch.zeros(1, 1)
    with pytest.raises(ConfigError, match="did you mean   silu"):
        gated(x, x, "slu")
