"""Noise on the embeddings: as large as the paper says, by the example's own length, and only while training."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor

from step_models import LENGTHS, family, rows
from truetune.data.pack import Batch
from truetune.data.plan import StepPlan, sequential_batches
from truetune.models.forward import Path, prepared
from truetune.models.survey import survey
from truetune.train.neftune import NoisyLoss, noise
from truetune.train.step import accumulate

WIDTH = 32


def batches(*, packing: bool, micro_tokens: int = 1000, step: int = 0, seed: int = 3) -> list[Batch]:
    plan = StepPlan.build(
        rows(), batch_size=len(LENGTHS), micro_tokens=micro_tokens, packing=packing, seed=seed, epochs=9, max_steps=None
    )
    return plan.micro_batches(step)


def by_example(made: list[Batch], alpha: float = 5.0) -> dict[int, Tensor]:
    """Example -> [length, width], its noise."""
    found: dict[int, Tensor] = {}
    for batch in made:
        values, lengths = noise(batch, WIDTH, alpha), [LENGTHS[i] for i in batch.examples]
        parts = values[0].split(lengths) if batch.lengths else [v[:n] for v, n in zip(values, lengths, strict=True)]
        found |= dict(zip(batch.examples, parts, strict=True))
    return found


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_it_is_uniform_up_to_alpha_over_the_root_of_length_and_width(packing: bool) -> None:
    for example, values in by_example(batches(packing=packing)).items():
        largest = 5.0 / (LENGTHS[example] * WIDTH) ** 0.5
        assert float(values.abs().max()) <= largest
        unit = values / largest
        error = 3.5 / unit.numel() ** 0.5  # of a mean of uniform numbers and of their squares: 0.58 and 0.30 sigmas
        assert abs(float(unit.mean())) < error * 0.58
        assert abs(float(unit.square().mean()) - 1 / 3) < error * 0.30
        assert float(unit.abs().max()) > 1 - 12 / unit.numel()


def test_it_does_not_depend_on_how_a_step_is_cut_or_packed() -> None:
    whole = by_example(batches(packing=True))
    for other in (
        batches(packing=True, micro_tokens=64),
        batches(packing=False),
        batches(packing=False, micro_tokens=9),
    ):
        assert all(torch.equal(whole[i], values) for i, values in by_example(other).items())


def test_each_step_seed_and_token_has_its_own() -> None:
    first = by_example(batches(packing=True))[1]
    assert not torch.equal(first, by_example(batches(packing=True, step=1))[1])
    assert not torch.equal(first, by_example(batches(packing=True, seed=4))[1])
    assert len({tuple(row) for row in first.tolist()}) == len(first)


def test_padding_has_none() -> None:
    (batch,) = batches(packing=False)
    values = noise(batch, WIDTH, 5.0)
    assert batch.attention_mask is not None
    assert torch.equal(values.abs().sum(-1) > 0, batch.attention_mask > 0)


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_virtual_tokens_have_none_and_make_no_example_longer(packing: bool) -> None:
    plan = StepPlan.build(
        rows().behind([97, 98]), batch_size=8, micro_tokens=1000, packing=packing, seed=3, epochs=1, max_steps=None
    )
    (batch,) = plan.micro_batches(0)
    values = noise(batch, WIDTH, 5.0)
    assert torch.equal(values[batch.input_ids >= 97].abs().sum(), torch.tensor(0.0))
    own = LENGTHS[batch.examples[0]]
    largest = 5.0 / (own * WIDTH) ** 0.5
    assert 0.99 * largest < float(values[0, 2 : own + 2].abs().max()) <= largest


# --- in a model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_loss_is_that_of_embeddings_with_the_noise_added(packing: bool, dtype: torch.dtype) -> None:
    model = family("llama").to(dtype)
    way, table = Path(model, survey(model), packing), model.get_input_embeddings()
    (batch,) = batches(packing=packing)
    seen: list[Tensor] = []
    spy = table.register_forward_hook(lambda module, args, rows: seen.append(rows))
    with prepared(way), torch.no_grad():
        plain, noisy = way.loss(batch), NoisyLoss(way.loss, table, 5.0)(batch)
        again = way.loss(batch)
    spy.remove()
    assert torch.equal(plain, again)
    assert not torch.equal(plain, noisy)
    count = batch.input_ids.shape[1]  # what follows only fills a row up
    spied = seen[1][:, :count]  # a hook that came before sees what the table itself put out
    expected = (spied + noise(batch, WIDTH, 5.0)).to(dtype)
    with prepared(way), torch.no_grad(), replaced(table, expected):
        assert torch.equal(way.loss(batch), noisy)


@contextlib.contextmanager
def replaced(table: Any, rows: Tensor) -> Any:
    def put(module: Any, args: Any, output: Tensor) -> Tensor:
        return torch.cat([rows, output[:, rows.shape[1] :]], dim=1)

    hook = table.register_forward_hook(put)
    yield
    hook.remove()


def test_the_step_is_the_same_however_it_is_cut() -> None:
    model = family("llama")
    way = Path(model, survey(model), packing=True)
    noisy = NoisyLoss(way.loss, model.get_input_embeddings(), 10.0)
    found = []
    for budget in (1000, 64):
        with prepared(way):
            made = batches(packing=True, micro_tokens=budget)
            loss = accumulate(noisy, made, seed=3, step=0, autocast=contextlib.nullcontext).loss
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        model.zero_grad(set_to_none=True)
        found.append((loss, gradient))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-6, rtol=1e-4)


def test_an_evaluation_between_two_steps_has_none() -> None:
    model = family("llama").eval()
    way = Path(model, survey(model), packing=True)
    held_out = sequential_batches(rows(), 1000, packing=True)[0]
    with prepared(way), torch.no_grad():
        before = [scores for scores, _ in way.scores(held_out)]
        NoisyLoss(way.loss, model.get_input_embeddings(), 5.0)(batches(packing=True)[0])
        after = [scores for scores, _ in way.scores(held_out)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_nothing_stays_on_the_table_when_a_step_fails() -> None:
    table = family("llama").get_input_embeddings()

    def fails(batch: Batch) -> Tensor:
        raise MemoryError

    with pytest.raises(MemoryError):
        NoisyLoss(fails, table, 5.0)(batches(packing=True)[0])
    assert len(table._forward_hooks) == 0
