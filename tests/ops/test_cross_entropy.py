"""Softmax cross-entropy and its gradient in place, against torch in float64."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from reference.closeness import assert_no_worse
from reference.differentiable import joined
from truetune.ops.cross_entropy import softmax_cross_entropy_

DTYPES = [torch.float32, torch.bfloat16]
FORMS = [(0.0, 0.0), (0.0, 0.1), (5.0, 0.0), (30.0, 0.2)]  # (softcap, smoothing)


def draws(n: int, vocab: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Logits, spread so that some rows are sure, and targets."""
    draw = torch.Generator().manual_seed(n * 1000 + vocab)
    logits = 4 * torch.randn(n, vocab, generator=draw)
    return logits.to(dtype), torch.randint(vocab, (n,), generator=draw)


def plainly(logits: Tensor, targets: Tensor, softcap: float, smoothing: float) -> tuple[Tensor, Tensor]:
    """Losses and gradient by torch, as one writes it: in float32, or float64 where that is given."""
    leaf = logits.clone().requires_grad_()
    wide = leaf.to(torch.promote_types(logits.dtype, torch.float32))
    capped = softcap * torch.tanh(wide / softcap) if softcap else wide
    losses = F.cross_entropy(capped, targets, reduction="none", label_smoothing=smoothing)
    return losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(0, 5), (1, 2), (1, 17), (3, 3), (100, 64), (7, 1000), (3, 1041), (2, 5003)], ids=str
)
def test_no_worse_than_torch(tier: str, shape: tuple[int, int], dtype: torch.dtype, form: tuple[float, float]) -> None:
    logits, targets = draws(*shape, dtype)
    plain, truth = plainly(logits, targets, *form), plainly(logits.double(), targets, *form)
    losses = softmax_cross_entropy_(logits, targets, softcap=form[0], smoothing=form[1], grad=True)
    assert losses.dtype == torch.float32
    assert_no_worse(losses, plain[0], truth[0])
    assert_no_worse(logits, plain[1], truth[1])


def test_a_vocabulary_of_one_is_certain(tier: str) -> None:
    logits = torch.tensor([[3.0], [-100.0]])
    losses = softmax_cross_entropy_(logits, torch.zeros(2, dtype=torch.int64), grad=True)
    assert losses.abs().max() < 1e-6
    assert logits.abs().max() < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_large_vocabulary_loses_no_digits(tier: str, dtype: torch.dtype) -> None:
    logits, targets = (0 * draws(2, 150_000)[0]).to(dtype), torch.tensor([0, 149_999])
    losses = softmax_cross_entropy_(logits, targets, grad=True)
    assert losses.tolist() == pytest.approx([math.log(150_000)] * 2, rel=1e-7)
    assert logits[:, 7].tolist() == pytest.approx([1 / 150_000] * 2, rel=2**-8)
    assert logits[[0, 1], targets].tolist() == [-1.0 if dtype == torch.bfloat16 else pytest.approx(1 / 150_000 - 1)] * 2


def test_without_a_gradient_the_logits_stay(tier: str) -> None:
    logits, targets = draws(5, 100)
    before = logits.clone()
    losses = softmax_cross_entropy_(logits, targets, softcap=5.0, smoothing=0.1, grad=False)
    assert torch.equal(logits, before)
    assert torch.equal(softmax_cross_entropy_(logits, targets, softcap=5.0, smoothing=0.1, grad=True), losses)


def test_rows_apart_and_columns_that_are_not_dense_are_taken(tier: str) -> None:
    logits, targets = draws(6, 50)
    losses, gradient = plainly(logits.double(), targets, 0.0, 0.0)
    wider = torch.cat((logits, torch.ones(6, 3)), 1)
    for given in (wider[:, :50], logits.T.contiguous().T):
        found = softmax_cross_entropy_(given, targets.repeat_interleave(2)[::2], grad=True)
        torch.testing.assert_close(found.double(), losses, atol=1e-5, rtol=1e-6)
        torch.testing.assert_close(given.double(), gradient, atol=1e-6, rtol=1e-5)
    assert torch.equal(wider[:, 50:], torch.ones(6, 3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_of_a_thousand_do_not_overflow(tier: str, dtype: torch.dtype) -> None:
    logits = torch.tensor([[1000.0, 0.0], [0.0, 1000.0], [-1000.0, -2000.0]], dtype=dtype)
    assert softmax_cross_entropy_(logits, torch.tensor([0, 0, 0]), grad=True).tolist() == [0.0, 1000.0, 0.0]
    assert logits.tolist() == [[0.0, 0.0], [-1.0, 1.0], [0.0, 0.0]]


def test_a_masked_vocabulary_takes_no_part(tier: str) -> None:
    logits, targets = draws(3, 3000)
    logits[:, :2000] = -math.inf  # more than is looked at at once
    losses, gradient = plainly(logits[:, 2000:].double(), targets % 1000, 0.0, 0.0)
    found = softmax_cross_entropy_(logits, targets % 1000 + 2000, grad=True)
    torch.testing.assert_close(found.double(), losses, atol=1e-5, rtol=1e-6)
    assert torch.equal(logits[:, :2000], torch.zeros(3, 2000))
    torch.testing.assert_close(logits[:, 2000:].double(), gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("at", [0, 7, 1500, 2999])
def test_a_nan_spoils_its_row_alone(tier: str, at: int, form: tuple[float, float], dtype: torch.dtype) -> None:
    logits, targets = draws(3, 3000, dtype)
    logits[1, at] = math.nan
    losses = softmax_cross_entropy_(logits, targets, softcap=form[0], smoothing=form[1], grad=True)
    assert losses.isnan().tolist() == [False, True, False]
    assert logits[1].isnan().all()
    assert logits[[0, 2]].isfinite().all()


def test_an_infinite_logit_gives_no_finite_loss(tier: str) -> None:
    logits, targets = draws(2, 100)
    logits[0, 3], logits[1] = math.inf, -math.inf
    assert softmax_cross_entropy_(logits, targets, grad=True).isnan().all()


@pytest.mark.parametrize("bad", [-1, -100, 50])
def test_a_target_outside_the_vocabulary_is_refused_before_anything_is_written(tier: str, bad: int) -> None:
    logits, targets = draws(4, 50)
    before, targets[2] = logits.clone(), bad
    with pytest.raises(IndexError, match="expected 0 to 49"):
        softmax_cross_entropy_(logits, targets, grad=True)
    assert torch.equal(logits, before)


@pytest.mark.usefixtures("two_threads")
def test_threads_change_no_bit(tier: str) -> None:
    logits, targets = draws(40, 2500, torch.bfloat16)

    def run() -> tuple[Tensor, Tensor]:
        gradient = logits.clone()
        return softmax_cross_entropy_(gradient, targets, softcap=9.0, smoothing=0.1, grad=True), gradient

    two = run()
    torch.set_num_threads(1)
    assert all(map(torch.equal, two, run()))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_gradient_is_the_derivative(form: tuple[float, float]) -> None:
    logits, targets = draws(4, 7)

    def forward(z: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        gradient = z.clone()
        losses = softmax_cross_entropy_(gradient, targets, softcap=form[0], smoothing=form[1], grad=True)
        return losses, (gradient,)

    def backward(g: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
        return (gradient * g[:, None],)

    assert torch.autograd.gradcheck(joined(forward, backward), (logits.double().requires_grad_(),))
