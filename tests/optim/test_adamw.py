"""AdamW's groups, and its step against the formula."""

import pytest
import torch
from torch.nn import Parameter

from truetune.optim.adamw import adamw


def test_matrices_decay_and_vectors_do_not() -> None:
    parameters = {"w": Parameter(torch.ones(2, 2)), "b": Parameter(torch.ones(2)), "s": Parameter(torch.tensor(1.0))}
    groups = adamw(parameters, lr=1e-3, weight_decay=0.1).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert {name: decay[id(p)] for name, p in parameters.items()} == {"w": 0.1, "b": 0.0, "s": 0.0}


def test_every_parameter_is_in_one_group() -> None:
    parameters = {str(n): Parameter(torch.ones([2] * n)) for n in range(4)}
    groups = adamw(parameters, lr=1e-3, weight_decay=0.1).param_groups
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(map(id, parameters.values()))


@pytest.mark.parametrize("shape", [(2, 3), (3,)])
def test_vectors_or_matrices_alone_make_one_group(shape: tuple[int, ...]) -> None:
    assert len(adamw({"p": Parameter(torch.ones(*shape))}, lr=1e-3, weight_decay=0.1).param_groups) == 1


def test_three_steps_are_those_of_the_paper() -> None:
    draw = torch.Generator().manual_seed(0)
    start, gradients = torch.randn(4, 3, generator=draw), torch.randn(3, 4, 3, generator=draw)
    parameter = Parameter(start.clone())
    optimizer = adamw({"w": parameter}, lr=0.01, weight_decay=0.1)
    truth, m, v = start.double(), torch.zeros(4, 3).double(), torch.zeros(4, 3).double()
    for step, gradient in enumerate(gradients, 1):
        parameter.grad = gradient.clone()
        optimizer.step()
        g = gradient.double()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        truth = truth * (1 - 0.01 * 0.1) - 0.01 * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    torch.testing.assert_close(parameter.detach().double(), truth, atol=1e-6, rtol=1e-6)  # float32 rounding
