"""Clipping at a percentile of a tensor's own last norms."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from truetune import optim
from truetune.optim.clipping import percentile_scale


def of_norm(norm: float) -> Tensor:
    return torch.full((100,), norm / 10)


def scales(norms: list[float], percentile: int) -> list[float]:
    state: dict[str, object] = {}
    found = []
    for number, norm in enumerate(norms, 1):
        state["step"] = number
        found.append(percentile_scale(state, of_norm(norm), percentile))
    return found


def test_an_outlier_is_scaled_to_what_is_usual() -> None:
    assert scales([1.0, 1.0, 1.0, 50.0, 0.5], 5) == pytest.approx([1.0, 1.0, 1.0, 1 / 50, 1.0])


def test_the_percentile_is_of_the_last_hundred() -> None:
    rising = [float(n) for n in range(1, 251)]
    found = scales(rising, 10)
    assert found[249] == pytest.approx(161 / 250)  # of 151 to 250, ten are smaller than 161
    assert found[0] == 1.0
    assert found[1] == pytest.approx(1 / 2)  # the first filled all hundred


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_leaves_no_trace(bad: float) -> None:
    assert scales([1.0, bad, 50.0], 50) == pytest.approx([1.0, 1.0, 1 / 50])


def test_a_gradient_of_zeros_stays_one() -> None:
    assert scales([0.0, 0.0], 50) == [1.0, 1.0]


def test_an_optimizer_uses_it_where_it_is_asked_to() -> None:
    moved = {}
    for percentile in (100, 5):
        p = Parameter(torch.zeros(100))
        optimizer = optim.SGD8bit([p], lr=1.0, momentum=1e-9, percentile_clipping=percentile)
        for norm in (1.0, 50.0):
            before = p.detach().clone()
            p.grad = of_norm(norm)
            optimizer.step()
        moved[percentile] = float((p.detach() - before).norm())
        assert ("gnorm_vec" in optimizer.state[p]) is (percentile == 5)
    assert moved == pytest.approx({100: 50.0, 5: 1.0}, rel=1e-5)
