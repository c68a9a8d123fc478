"""Cross-entropy as a sum."""

import math

import pytest
import torch

from truetune.ops.loss import cross_entropy_sum


def test_the_sum_is_the_definition_in_float64() -> None:
    logits = torch.randn(50, 37, generator=torch.Generator().manual_seed(0)) * 10
    targets = torch.arange(50) % 37
    truth = 0.0
    for row, target in zip(logits.double().tolist(), targets.tolist(), strict=True):
        top = max(row)
        truth += top + math.log(sum(math.exp(value - top) for value in row)) - row[target]
    assert float(cross_entropy_sum(logits, targets)) == pytest.approx(truth, rel=1e-6)  # float32


def test_the_gradient_is_the_derivative() -> None:
    logits = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: cross_entropy_sum(x, torch.arange(6) % 5), (logits,))


def test_bfloat16_logits_are_summed_in_float32() -> None:
    logits = torch.zeros(1000, 16, dtype=torch.bfloat16)
    loss = cross_entropy_sum(logits, torch.zeros(1000, dtype=torch.int64))
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(1000 * math.log(16), rel=1e-6)


def test_no_targets_give_zero_and_a_gradient_of_zeros() -> None:
    logits = torch.zeros(0, 7, requires_grad=True)
    loss = cross_entropy_sum(logits, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert logits.grad is not None


def test_logits_of_a_thousand_do_not_overflow() -> None:
    logits = torch.tensor([[1000.0, 0.0], [0.0, 1000.0]])
    assert float(cross_entropy_sum(logits, torch.tensor([0, 0]))) == 1000.0
