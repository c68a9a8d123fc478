"""Training here and with PEFT, transformers' loss and torch's AdamW is the same training."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import truetune
from families import FAMILIES, VOCAB
from truetune.data.pack import Batch, collate
from truetune.data.token_set import TokenSet
from truetune.models import forward
from truetune.models.survey import survey
from truetune.optim.adamw import adamw
from truetune.train.step import accumulate, update

STEPS, ROWS, LENGTH, LR, DECAY = 20, 4, 16, 5e-3, 0.01


def rows() -> tuple[Tensor, Tensor]:
    """([steps * rows, length] ids, where they are learned): every row has a prompt of its own length."""
    draws = torch.Generator().manual_seed(5)
    ids = torch.randint(0, VOCAB, (STEPS * ROWS, LENGTH), generator=draws)
    prompts = torch.randint(1, LENGTH - 2, (STEPS * ROWS, 1), generator=draws)
    return ids, torch.arange(LENGTH) >= prompts


def batches() -> list[Batch]:
    ids, learned = rows()
    data = TokenSet.from_lists(ids.tolist(), learned.tolist(), [])
    return [collate(data, range(step * ROWS, (step + 1) * ROWS), packing=True) for step in range(STEPS)]


def train_here(model: Any) -> list[float]:
    """With the pieces of ``truetune sft``."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = adamw(parameters, lr=LR, weight_decay=DECAY)
    way = forward.Path(model, survey(model.train()), packing=True)
    losses = []
    with forward.prepared(way, recompute="cheap"):
        for step, batch in enumerate(batches()):
            losses.append(accumulate(way.loss, [batch], seed=0, step=step, autocast=nullcontext).loss)
            update(optimizer, parameters.values(), lr=LR, clip=0.0)
    return losses


def train_there(model: Any) -> list[float]:
    """As the documentation of PEFT and transformers shows it."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, weight_decay=DECAY)
    ids, learned = rows()
    losses = []
    model.train()
    for step in range(STEPS):
        here = slice(step * ROWS, (step + 1) * ROWS)
        loss = model(input_ids=ids[here], labels=ids[here].masked_fill(~learned[here], -100)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_losses_and_adapter_are_those_of_peft_and_transformers(family: str, tmp_path: Path) -> None:
    """Only sums are taken in another order, which moves losses near 5 by about 5e-7.

    AdamW divides by the root of a mean of squares, so where a gradient is nearly 0 its rounding can turn a step of
    ``LR``; such entries are rare: all but one in a thousand stay within 1e-5, and none is off by more than a step.
    """
    start, here, there = FAMILIES[family].make(), FAMILIES[family].make(), FAMILIES[family].make()
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(FAMILIES[family].targets), task_type="CAUSAL_LM",
                               fan_in_fan_out=family == "gpt2")  # fmt: skip
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        torch.manual_seed(0)
        peft.get_peft_model(start, settings).save_pretrained(str(tmp_path / "start"))
        foreign = peft.PeftModel.from_pretrained(there, str(tmp_path / "start"), is_trainable=True)
    truetune.load_adapter(here, str(tmp_path / "start"))
    ours, theirs = train_here(here), train_there(foreign)
    assert ours == pytest.approx(theirs, abs=1e-5)
    assert max(ours) - min(ours) > 0.05  # it learned something

    truetune.save_adapter(here, str(tmp_path / "ours"))
    foreign.save_pretrained(str(tmp_path / "theirs"))
    left, right, begun = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("ours", "theirs", "start"))
    assert left.keys() == right.keys()
    gaps = torch.cat([(left[key] - right[key]).abs().flatten() for key in left])
    moved = torch.cat([(begun[key] - right[key]).abs().flatten() for key in left])
    assert float((gaps > 1e-5).float().mean()) < 1e-3
    assert gaps.max() < LR
    assert moved.mean() > LR
