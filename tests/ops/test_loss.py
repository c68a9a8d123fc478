"""Cross-entropy as a sum, of logits and of hidden states."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from reference.norms import assert_no_worse_as_a_whole
from truetune.adapters.base import Adapter
from truetune.adapters.lora import LoRALinear
from truetune.adapters.lora_embedding import LoRAEmbedding, TiedHead
from truetune.ops.loss import Head, cross_entropy_sum, linear_cross_entropy

WIDTH, VOCAB, ROWS = 6, 37, 10
FORMS: dict[str, dict[str, float]] = {
    "plain": {},
    "scaled": {"scale": 0.25},
    "capped": {"softcap": 2.0},
    "both": {"scale": 3.0, "softcap": 5.0},
}
KINDS = ("frozen", "frozen-bias", "trained", "trained-bias", "lora", "tied")


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


def head_of_kind(kind: str, *, vocab: int = VOCAB, dtype: torch.dtype = torch.float64, **form: float) -> Head:
    """A head as ``models.layers`` describes it, with adapters that are no longer where they start."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(vocab)
        linear = nn.Linear(WIDTH, vocab, bias=kind.endswith("bias"), dtype=dtype)
        linear.requires_grad_(kind.startswith("trained"))
        module: nn.Module = linear
        if kind == "lora":
            module = LoRALinear(linear, rank=2, alpha=3.0)
        elif kind == "tied":
            module = TiedHead(
                linear, LoRAEmbedding(nn.Embedding(vocab, WIDTH, _weight=linear.weight), rank=2, alpha=3.0)
            )
        own = [p for p in module.parameters() if p.requires_grad]
        parameters = (*own, *(module.shared_parameters() if isinstance(module, Adapter) else ()))
        for parameter in parameters if isinstance(module, Adapter) else ():
            parameter.data = torch.randn(parameter.shape, dtype=torch.promote_types(dtype, torch.float32))
    plain = kind.startswith("frozen")
    return Head(module, linear.weight if plain else None, linear.bias if plain else None, parameters=parameters, **form)


def hidden_and_targets(rows: int = ROWS, vocab: int = VOCAB) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(rows)
    hidden = 2 * torch.randn(rows, WIDTH, dtype=torch.float64, generator=draw)
    return hidden.requires_grad_(), torch.randint(vocab, (rows,), generator=draw)


def whole(hidden: Tensor, targets: Tensor, head: Head, smoothing: float = 0.0) -> Tensor:
    """By torch, from logits that exist as a whole."""
    scores = head.module(hidden) * head.scale
    if head.softcap:
        scores = head.softcap * torch.tanh(scores / head.softcap)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return F.cross_entropy(scores, targets, reduction="sum", label_smoothing=smoothing)


def with_gradients(loss: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(0.7 * loss, leaves)]


@pytest.mark.parametrize("chunk", [1, 3, 64, None])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_give_the_loss_and_the_gradients_of_whole_logits(
    kind: str, form: str, smoothing: float, chunk: int | None
) -> None:
    head, (hidden, targets) = head_of_kind(kind, **FORMS[form]), hidden_and_targets()
    leaves = [hidden, *head.parameters]
    expected = with_gradients(whole(hidden, targets, head, smoothing), leaves)
    found = with_gradients(linear_cross_entropy(hidden, targets, head, smoothing=smoothing, chunk=chunk), leaves)
    assert len(leaves) == {"frozen": 1, "frozen-bias": 1, "trained": 2}.get(kind, 3)
    for ours, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, truth, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["frozen-bias", "trained-bias"])
def test_the_gradient_of_chunks_is_that_of_finite_differences(kind: str, form: str) -> None:
    head, (hidden, targets) = head_of_kind(kind, vocab=5, **FORMS[form]), hidden_and_targets(4, 5)
    assert torch.autograd.gradcheck(lambda x: linear_cross_entropy(x, targets, head, smoothing=0.1, chunk=3), (hidden,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["frozen", "frozen-bias"])
def test_in_narrow_dtypes_chunks_are_no_worse_than_torch(tier: str, kind: str, form: str, dtype: torch.dtype) -> None:
    head, (hidden, targets) = head_of_kind(kind, dtype=dtype, **FORMS[form]), hidden_and_targets(100)
    narrow = hidden.detach().to(dtype).requires_grad_()
    wide = narrow.detach().double().requires_grad_()
    doubled = replace(head, module=lambda x: F.linear(x, *(t if t is None else t.double() for t in _tensors(head))))
    truth = with_gradients(whole(wide, targets, doubled), [wide])
    plain = with_gradients(whole(narrow, targets, head), [narrow])
    found = with_gradients(linear_cross_entropy(narrow, targets, head, chunk=30), [narrow])
    assert found[0].dtype == torch.float32
    for ours, theirs, exact in zip(found, plain, truth, strict=True):
        assert_no_worse_as_a_whole(ours, theirs, exact, dtype)


def _tensors(head: Head) -> tuple[Tensor, Tensor | None]:
    assert head.weight is not None
    return head.weight, head.bias


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows_have_no_loss_and_gradients_of_zeros(kind: str) -> None:
    head, (hidden, targets) = head_of_kind(kind), hidden_and_targets(0)
    loss, *gradients = with_gradients(linear_cross_entropy(hidden, targets, head), [hidden, *head.parameters])
    assert float(loss) == 0.0
    assert all(not g.any() for g in gradients)


class Watch(TorchDispatchMode):
    """Notes every operation, and the shape of what it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, Tensor):
                self.made.append((str(func), tuple(t.shape)))
        return out

    def products(self) -> int:
        return sum(name.startswith(("aten.mm", "aten.addmm")) for name, _ in self.made)


@pytest.mark.parametrize("kind", KINDS)
def test_the_logits_never_exist_as_a_whole(kind: str) -> None:
    vocab, rows, chunk = 500, 40, 4
    head, (hidden, targets) = head_of_kind(kind, vocab=vocab, scale=0.5, softcap=9.0), hidden_and_targets(rows, vocab)
    with Watch() as watch:
        linear_cross_entropy(hidden, targets, head, smoothing=0.1, chunk=chunk).backward()
    sizes = {shape for _, shape in watch.made}
    assert max(map(math.prod, sizes)) <= max(chunk, WIDTH) * vocab  # of the weight itself, where it has a gradient
    assert (chunk, vocab) in sizes


def test_without_a_choice_a_chunk_takes_32_mib() -> None:
    vocab, hidden = 1 << 17, torch.zeros(130, WIDTH)
    head = head_of_kind("frozen", vocab=vocab, dtype=torch.float32)
    with Watch() as watch:
        loss = linear_cross_entropy(hidden, torch.zeros(130, dtype=torch.int64), head)
    assert [shape for name, shape in watch.made if name.startswith("aten.mm")] == [(64, vocab), (64, vocab), (2, vocab)]
    assert float(loss) == pytest.approx(130 * math.log(vocab), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_computed_for_a_gradient_that_nobody_asks_for(kind: str) -> None:
    head, (hidden, targets) = head_of_kind(kind), hidden_and_targets()
    with torch.no_grad(), Watch() as one_pass:
        expected = whole(hidden, targets, head)
    with torch.no_grad(), Watch() as watch:
        found = linear_cross_entropy(hidden, targets, head, chunk=ROWS)
    torch.testing.assert_close(found, expected)
    assert watch.products() == one_pass.products()


def test_a_frozen_head_makes_two_products_a_chunk() -> None:
    head, (hidden, targets) = head_of_kind("frozen"), hidden_and_targets()
    with Watch() as watch:
        linear_cross_entropy(hidden, targets, head, chunk=5).backward()
    assert watch.products() == 2 * ROWS // 5


@pytest.mark.parametrize("kind", KINDS)
def test_going_back_twice_gives_the_same_gradients(kind: str) -> None:
    head, (hidden, targets) = head_of_kind(kind), hidden_and_targets()
    loss = linear_cross_entropy(hidden, targets, head, chunk=3)
    leaves = [hidden, *head.parameters]
    first, second = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_a_trained_head_learns_from_hidden_states_that_do_not() -> None:
    head, (hidden, targets) = head_of_kind("trained"), hidden_and_targets()
    fixed = hidden.detach()
    expected = with_gradients(whole(fixed, targets, head), head.parameters)
    found = with_gradients(linear_cross_entropy(fixed, targets, head, chunk=3), head.parameters)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    assert fixed.grad is None


@pytest.mark.parametrize("bad", [-100, VOCAB])
@pytest.mark.parametrize(("kind", "words"), [("frozen", "expected 0 to 36"), ("trained", "out of bounds")])
def test_a_target_outside_the_vocabulary_is_refused(kind: str, words: str, bad: int) -> None:
    hidden, targets = hidden_and_targets()
    targets[3] = bad
    with pytest.raises(IndexError, match=words):
        linear_cross_entropy(hidden, targets, head_of_kind(kind))


def test_products_of_a_narrow_head_come_in_few_sizes() -> None:
    head = head_of_kind("frozen", dtype=torch.bfloat16)
    sizes = set()
    for rows in range(1, 140, 9):
        hidden, targets = hidden_and_targets(rows)
        with Watch() as watch:
            linear_cross_entropy(hidden.bfloat16(), targets, head, chunk=64).backward()
        sizes |= {shape[0] for name, shape in watch.made if name.startswith("aten.mm")}
    assert sizes == {64}
