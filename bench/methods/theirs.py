"""PEFT and a plain loop of torch, asked step by step: ``python -m bench.methods.theirs``, in any environment."""

from __future__ import annotations

import itertools
import tempfile
import warnings
from pathlib import Path
from typing import Any

import peft
import torch

from bench.methods import llama
from bench.peers.answers import Job, peak_mb, serve
from bench.shapes import Shape

LR = 1e-4
warnings.filterwarnings("ignore")  # its advice is not for who measures


def step(kind: str, arguments: dict[str, Any], setting: dict[str, Any]) -> Job:
    """A step: the model's own loss, its gradient, clipped, AdamW; AdaLoRA's ranks are weighed as its users are told."""
    on = llama.setting_of(setting)
    model: Any = peft.get_peft_model(llama.model(on), getattr(peft, kind)(**arguments)).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    # AdaLoRA's counts of ranks, which PEFT leaves open to training beside a bf16 base, are no parameters of the method.
    counted = sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and "ranknum" not in name)
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0)
    ids, learned = llama.rows(on)
    labels, numbers = ids.where(learned, -100), itertools.count()
    weighs = getattr(model.base_model, "update_and_allocate", None)

    def call() -> float:
        loss = model(input_ids=ids, labels=labels, attention_mask=torch.ones_like(ids), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if weighs is not None:
            weighs(next(numbers))
        optimizer.zero_grad()
        return float(loss.detach())

    return Job(call, lambda loss: {"loss": loss, "trained": counted, "peak_mb": peak_mb()})


def _adapted(shape: dict[str, Any], rank: int) -> Any:
    return peft.get_peft_model(
        llama.hollow(Shape(**shape)), peft.LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    )


def save(shape: dict[str, Any], rank: int) -> Job:
    """Write an adapter on all linear layers."""
    model, folder = _adapted(shape, rank), tempfile.mkdtemp()
    return Job(lambda: model.save_pretrained(folder))


def load(shape: dict[str, Any], rank: int) -> Job:
    """Read one into a model that has none, and take it out again."""
    folder = Path(tempfile.mkdtemp())
    _adapted(shape, rank).save_pretrained(folder)
    base = llama.hollow(Shape(**shape))

    def call() -> None:
        peft.PeftModel.from_pretrained(base, str(folder)).unload()

    return Job(call)


if __name__ == "__main__":
    serve({"step": step, "save": save, "load": load})
