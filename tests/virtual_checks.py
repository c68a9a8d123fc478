"""What holds of every method whose adapter is no part of a weight: those with virtual tokens in front among them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from families import distance, token_rows
from method_checks import CLOSE, base
from step_models import LENGTHS, rows
from truetune.adapters import files
from truetune.adapters.inject import attach, attachment
from truetune.adapters.virtual import virtual_ids
from truetune.config.adapter import AdapterConfig
from truetune.data.plan import StepPlan
from truetune.generate.answer import answer_all
from truetune.models.forward import Path as Way
from truetune.models.forward import prepared
from truetune.models.fused import Recompute
from truetune.models.survey import survey
from truetune.optim.adamw import adamw
from truetune.train.step import accumulate, update

NEW = 6


def behind(model: nn.Module, ids: Tensor) -> Tensor:
    """[B, n + T]: rows with the model's virtual tokens in front."""
    own = torch.tensor(virtual_ids(model), dtype=torch.int64)
    return torch.cat([own.expand(len(ids), -1), ids], dim=1)


def text_logits(model: PreTrainedModel, ids: Tensor | None = None) -> Tensor:
    """[B, T, vocab] of the text alone, without a cache."""
    whole = behind(model, token_rows() if ids is None else ids)
    with torch.no_grad():
        scores: Tensor = model.eval()(input_ids=whole, use_cache=False).logits
    return scores[:, len(virtual_ids(model)) :]


def plan_of(model: nn.Module, *, packing: bool) -> StepPlan:
    """All rows in one step, in two micro-batches and more."""
    data = rows().behind(virtual_ids(model))
    return StepPlan.build(
        data, batch_size=len(LENGTHS), micro_tokens=120, packing=packing, seed=3, epochs=1, max_steps=None
    )


def step(
    model: PreTrainedModel, *, packing: bool, fused: bool = True, recompute: Recompute = "none"
) -> tuple[float, dict[str, Tensor]]:
    """The loss of a step and the gradient of all that is trained."""
    way = Way(model, survey(model), packing)
    model.train().zero_grad()
    with prepared(way, recompute=recompute, full_layers=2 if recompute == "full" else 0, fused=fused):
        batches = plan_of(model, packing=packing).micro_batches(0)
        loss = accumulate(way.loss, batches, seed=3, step=0, autocast=_plain).loss
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same_step(one: tuple[float, dict[str, Tensor]], other: tuple[float, dict[str, Tensor]]) -> bool:
    """Up to another order of summation."""
    assert one[1].keys() == other[1].keys()
    assert one[1]
    return abs(one[0] - other[0]) < 1e-5 and all(
        float((one[1][name] - other[1][name]).norm() / other[1][name].norm()) < 1e-4 for name in one[1]
    )


def learn(model: PreTrainedModel, *, steps: int, lr: float) -> list[float]:
    """The losses of steps over the same rows."""
    found = survey(model)
    way, plan = Way(model, found, found.packs), plan_of(model, packing=found.packs)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer, losses = adamw(trained, lr=lr, weight_decay=0.0), []
    model.train()
    for number in range(steps):
        with prepared(way):
            result = accumulate(way.loss, plan.micro_batches(0), seed=3, step=number, autocast=_plain)
            update(optimizer, trained.values(), lr=lr, clip=1.0)
        losses.append(result.loss)
    return losses


def check(name: str, form: str, config: AdapterConfig, folder: Path, *, lr: float) -> None:
    """It learns, is read back as it was written, and generates what it was taught to think."""
    model, again = base(name, form), base(name, form)
    before = text_logits(model)
    attached = attach(model, config, seed=1)
    assert attached.virtual_tokens == len(virtual_ids(model))
    losses = learn(model, steps=5, lr=lr)
    assert losses[-1] < losses[0] - 0.01
    live = text_logits(model)
    assert distance(live, before) > 1e-3
    files.save(model, folder, base=None)
    files.load(again, files.read(folder))
    assert attachment(again) is not None
    assert torch.equal(text_logits(again), live)
    check_generation(again, exact=form in ("float32", "nf4"))


def check_generation(model: PreTrainedModel, *, exact: bool) -> None:
    """With a cache and padding, tokens are what the whole text alone gives; and so are their scores."""
    prompts = [token_rows(rows=1, length=n, seed=n)[0].tolist() for n in (9, 4)]
    own = virtual_ids(model)
    width = max(map(len, prompts)) + len(own)
    padded = [[0] * (width - len(own) - len(p)) + own + p for p in prompts]
    mask = torch.tensor([[0] * (width - len(own) - len(p)) + [1] * (len(own) + len(p)) for p in prompts])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        first = model(input_ids=torch.tensor(padded), attention_mask=mask, position_ids=positions, use_cache=True)
        token = torch.tensor([[5], [7]])
        mask = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], dim=1)
        second = model(
            input_ids=token, attention_mask=mask, position_ids=positions[:, -1:] + 1, use_cache=True,
            past_key_values=first.past_key_values,
        )  # fmt: skip
    for row, (prompt, new) in enumerate(zip(prompts, (5, 7), strict=True)):
        alone = text_logits(model, torch.tensor([[*prompt, new]]))[0]
        found = torch.stack([first.logits[row, -1], second.logits[row, -1]])
        assert distance(found, alone[-2:]) <= (CLOSE if exact else 0.05)
    if exact:
        together = answer_all(model, prompts, stop_ids=frozenset(), longest=NEW)
        singly = [answer_all(model, [p], stop_ids=frozenset(), longest=NEW)[0] for p in prompts]
        assert together == singly
        taught = text_logits(model, torch.tensor([[*prompts[0], *singly[0]]]))[0]
        assert taught[len(prompts[0]) - 1 : -1].argmax(-1).tolist() == singly[0]


def _plain() -> Any:
    return torch.enable_grad()
