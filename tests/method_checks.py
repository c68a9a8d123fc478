"""What holds of every adapter, whatever its method: it learns, is read back as it was written, and merges exactly."""

from __future__ import annotations

import contextlib
import functools
import itertools
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from families import FAMILIES, distance, logits, token_rows
from packed import KINDS, dense_twin
from step_models import LENGTHS, rows
from truetune.adapters import files, tensors
from truetune.adapters.inject import attach
from truetune.adapters.methods import trained_parts
from truetune.config.adapter import AdapterConfig
from truetune.data.plan import StepPlan
from truetune.models.forward import Path as Way
from truetune.models.forward import prepared
from truetune.models.survey import survey
from truetune.optim.adamw import adamw
from truetune.quant.replace import replace
from truetune.train.hooks import Hooks
from truetune.train.step import accumulate, update

NAMES = ("llama", "gpt2", "bigcode", "bloom")
BASES = ("float32", "bfloat16", "int8", "nf4")
EACH = [*itertools.product(NAMES, BASES)]
ROUGH = 0.05
CLOSE = 1e-5  # float32, of the largest logit: another order of summation; up to 1e-6 was seen


def base(name: str, form: str = "float32") -> PreTrainedModel:
    """A tiny model of a family, its linear layers dense or packed; packed ones compute in float32."""
    model = FAMILIES[name].make()
    if form in KINDS:
        replace(model, KINDS[form], dtype=torch.float32)
        return model
    return model.to(getattr(torch, form))


def learn(
    model: PreTrainedModel, config: AdapterConfig, *, steps: int = 4, lr: float = 1e-2, hooks: Hooks | None = None
) -> list[float]:
    """Steps over the same eight rows, as a run makes them; the loss of each."""
    hooks = hooks or Hooks()
    narrow = model.get_input_embeddings().weight.dtype != torch.float32 and bool(
        trained_parts(config)
    )  # then products are cast

    def autocast() -> AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16) if narrow else contextlib.nullcontext()

    with autocast():
        found = survey(model)
    plan = StepPlan.build(
        rows(), batch_size=len(LENGTHS), micro_tokens=200, packing=found.packs, seed=3, epochs=1, max_steps=None
    )
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer, way, losses = adamw(trained, lr=lr, weight_decay=0.0), Way(model, found, found.packs), []
    model.train()
    for step in range(steps):
        with prepared(way), hooks.around(step):
            result = accumulate(way.loss, plan.micro_batches(0), seed=3, step=step, autocast=autocast)
            if hooks.penalty:
                hooks.penalty().backward()  # type: ignore[no-untyped-call]
            after = functools.partial(hooks.after_update, step) if hooks.after_update else None
            update(optimizer, trained.values(), lr=lr, clip=1.0, after=after)
        losses.append(result.loss)
    return losses


def check(name: str, form: str, config: AdapterConfig, folder: Path, *, lr: float) -> None:
    """It learns; what is saved and loaded again computes the same; and so does what it is merged into."""
    model, again = base(name, form), base(name, form)
    before = logits(model)
    attach(model, config, seed=1)
    losses = learn(model, config, lr=lr)
    assert losses[-1] < losses[0] - 0.01
    with torch.autocast("cpu", torch.bfloat16, enabled=form == "bfloat16" and bool(trained_parts(config))):
        live = logits(model)
    assert distance(live, before) > 1e-3
    files.save(model, folder, base=None)
    files.load(again, files.read(folder))
    if form != "bfloat16":  # there, parts that are trained are in float32 and are rounded when they are loaded
        assert torch.equal(logits(again), live)
    # The products of int8 round what comes in as well, and bf16 what is merged.
    folded = merged(name, form, model)
    assert distance(logits(folded), live) <= (CLOSE if form in ("float32", "nf4") else ROUGH)
    check_padding(again, form)


def merged(name: str, form: str, model: nn.Module) -> nn.Module:
    """A dense model with the adapter of another folded in, by the functions that the streaming merge applies."""
    plain = dense_twin(base(name, form))
    held = tensors.to_file(model)
    changes = tensors.changes(model, held)
    replaced = tensors.replaced_tensors(model, held)
    parameters = dict(plain.named_parameters())
    with torch.no_grad():
        for path, parameter in parameters.items():
            parameter.copy_(replaced.get(path, parameter))
        for path, change in changes.items():
            parameters[path].copy_(change(parameters[path]))
    return plain


def check_padding(model: PreTrainedModel, form: str) -> None:
    """Rows of a batch are computed alike alone, and behind padding."""
    ids = token_rows(rows=2, length=9)
    short = ids[:1, 4:]
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        both: Tensor = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    close = CLOSE if form in ("float32", "nf4") else 0.05
    assert distance(both[1], logits(model, ids[1:])[0]) <= close
    assert distance(both[0, 4:], logits(model, short)[0]) <= close
