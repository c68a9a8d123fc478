"""The 32-bit optimizers: against their papers in float64, and against torch's where torch has them."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from reference import optimizers as restated
from truetune import optim
from truetune.ops import dispatch

Make = Callable[[list[Parameter]], torch.optim.Optimizer]
CLOSE: dict[str, float] = {"rtol": 1e-5, "atol": 1e-6}  # float32 rounding over twelve steps


@pytest.fixture(params=["reference", "auto"], autouse=True)
def _tier(request: pytest.FixtureRequest) -> Iterator[None]:
    with dispatch.forced(request.param):
        yield


def problem(shape: tuple[int, ...] = (70, 90), steps: int = 12) -> tuple[Tensor, list[Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=draw) * 0.1, [torch.randn(shape, generator=draw) * 0.01 for _ in range(steps)]


def trained(make: Make, start: Tensor, gradients: list[Tensor]) -> Tensor:
    parameter = Parameter(start.clone())
    optimizer = make([parameter])
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


PAPERS: list[tuple[type[Any], Callable[..., Tensor], dict[str, Any], dict[str, Any]]] = [
    # class, its paper, settings of both, settings of the paper alone
    (optim.Adam, restated.adam, {"lr": 1e-2}, {}),
    (optim.Adam, restated.adam, {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.2}, {}),
    (optim.AdamW, restated.adam, {"lr": 1e-2}, {"weight_decay": 0.01}),
    (optim.LAMB, restated.lamb, {"lr": 1e-2, "weight_decay": 0.1}, {}),
    (optim.AdEMAMix, restated.ademamix, {"lr": 1e-2}, {"weight_decay": 0.01}),
    (
        optim.AdEMAMix,
        restated.ademamix,
        {"lr": 1e-2, "alpha": 3.0, "weight_decay": 0.1, "t_alpha": 8, "t_beta3": 9},
        {},
    ),
    (optim.Lion, restated.lion, {"lr": 1e-3, "weight_decay": 0.1}, {}),
    (optim.SGD, restated.sgd, {"lr": 1e-1, "weight_decay": 0.1}, {}),
    (optim.LARS, restated.sgd, {"lr": 1.0, "weight_decay": 0.1}, {"max_unorm": 0.02}),
    (optim.RMSprop, restated.rmsprop, {"lr": 1e-2, "weight_decay": 0.1}, {}),
    (optim.Adagrad, restated.adagrad, {"lr": 1e-2, "weight_decay": 0.1}, {}),
]


@pytest.mark.parametrize(("ours", "paper", "both", "alone"), PAPERS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_step_is_that_of_the_paper(
    ours: type[Any], paper: Callable[..., Tensor], both: dict[str, Any], alone: dict[str, Any]
) -> None:
    start, gradients = problem()
    found = trained(lambda p: ours(p, **both), start, gradients)
    expected = paper(start, gradients, **both, **alone)
    torch.testing.assert_close(found.double(), expected, **CLOSE)
    assert (found - start).abs().mean() > 1e-3  # it did move


T = torch.optim
TORCH: dict[str, tuple[Make, Make]] = {
    "AdamW": (lambda p: optim.AdamW(p, lr=1e-2, weight_decay=0.1), lambda p: T.AdamW(p, lr=1e-2, weight_decay=0.1)),
    "Adam": (
        lambda p: optim.Adam(p, lr=1e-2, weight_decay=0.1, eps=1e-4),
        lambda p: T.Adam(p, lr=1e-2, weight_decay=0.1, eps=1e-4, decoupled_weight_decay=True),
    ),
    "RMSprop": (
        lambda p: optim.RMSprop(p, lr=1e-2, alpha=0.9, weight_decay=0.1),
        lambda p: T.RMSprop(p, lr=1e-2, alpha=0.9, weight_decay=0.1),
    ),
    "Adagrad": (
        lambda p: optim.Adagrad(p, lr=1e-2, weight_decay=0.1),
        lambda p: T.Adagrad(p, lr=1e-2, weight_decay=0.1),
    ),
    "SGD": (
        lambda p: optim.SGD(p, lr=1e-1, momentum=0.8, weight_decay=0.1),
        lambda p: T.SGD(p, lr=1e-1, momentum=0.8, weight_decay=0.1),
    ),
}


@pytest.mark.parametrize("name", TORCH)
def test_a_step_is_that_of_torch(name: str) -> None:
    start, gradients = problem()
    ours, theirs = (trained(make, start, gradients) for make in TORCH[name])
    torch.testing.assert_close(ours, theirs, **CLOSE)


def test_a_parameter_of_zeros_is_not_held_fast_by_its_norm() -> None:
    """As a LoRA's second matrix starts: a bound of ‖p‖ = 0 would keep it there for ever."""
    _, gradients = problem()
    for ours in (optim.LAMB, optim.LARS, optim.LAMB8bit, optim.LARS8bit):
        assert trained(ours, torch.zeros(70, 90), gradients[:1]).abs().mean() > 1e-6


@pytest.mark.parametrize(("ours", "bound"), [(optim.LAMB8bit, 1.0), (optim.LARS8bit, 0.02)])
def test_the_bound_on_the_update_holds_in_8_bits_too(ours: type[Any], bound: float) -> None:
    start, gradients = problem()
    after = trained(lambda p: ours(p, lr=1.0), start * 1e-3, [g * 1e3 for g in gradients[:1]])
    ratio = float((after - start * 1e-3).norm() / (start * 1e-3).norm())
    corrected = bound * (0.001**0.5 / 0.1 if bound == 1.0 else 1.0)  # LAMB's is bounded before its bias correction
    assert ratio == pytest.approx(corrected, rel=1e-4)
