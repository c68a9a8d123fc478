"""truetune's side, asked step by step: ``python -m bench.methods.ours``."""

from __future__ import annotations

import contextlib
import functools
import itertools
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.methods import llama
from bench.methods.pairs import STEPS, Setting
from bench.peers.answers import Job, peak_mb, serve
from bench.shapes import Shape
from truetune.adapters import files
from truetune.adapters.inject import attach, detach, tune
from truetune.adapters.methods import trained_parts
from truetune.adapters.virtual import virtual_ids
from truetune.checkpoint.run_state import trained_state
from truetune.config.adapter import AdapterConfig
from truetune.config.lora import LoRA
from truetune.config.methods import METHODS
from truetune.data.plan import StepPlan
from truetune.data.schema import Origin
from truetune.data.token_set import TokenSet
from truetune.models.forward import Path as Way
from truetune.models.forward import prepared
from truetune.models.precision import Precision, choose_precision
from truetune.models.survey import survey
from truetune.ops.allocator import keep_freed_memory
from truetune.optim.adamw import adamw
from truetune.recipes.method_hooks import method_hooks
from truetune.train.step import accumulate, update

LR = 1e-4
_MICRO_TOKENS = 768  # what a run takes without being told
_open = contextlib.ExitStack()  # a run goes its way from the first step to the last, and so does this process


def dtype() -> Job:
    """What a run would choose for a bf16 checkpoint here."""
    chosen = choose_precision("auto", torch.bfloat16, device="cpu", trains="adapter").storage
    return Job(lambda: None, lambda _: {"dtype": str(chosen).removeprefix("torch.")})


def step(method: str, settings: dict[str, Any], setting: dict[str, Any], biased: bool) -> Job:
    """A step of a method, as a run makes it."""
    keep_freed_memory()
    on = llama.setting_of(setting)
    config = METHODS[method].config(**settings)
    precision = choose_precision(on.dtype, torch.bfloat16, device="cpu", trains=_trains(method, config))
    model = llama.model(on, biased=biased).to(precision.storage)
    tune(model, config)
    with precision.context("cpu"):
        way = Way(model, survey(model), packing=True)
    _open.enter_context(prepared(way, recompute="cheap"))
    trained = trained_state(model)
    return Job(
        _stepping(way, config, precision, examples(on)),
        lambda loss: {
            "loss": loss,
            "trained": sum(p.numel() for p in trained.values()),
            "fused": len(way.survey.fusable),
            "peak_mb": peak_mb(),
        },
    )


def _stepping(way: Way, config: AdapterConfig, precision: Precision, data: TokenSet) -> Any:
    trained = trained_state(way.model)
    optimizer = adamw(trained, lr=LR, weight_decay=0.0)
    hooks = method_hooks(way.model, config, optimizer, seed=0, steps=STEPS)
    plan = StepPlan.build(
        data.behind(virtual_ids(way.model)), batch_size=len(data), micro_tokens=_MICRO_TOKENS, packing=True, seed=0,
        epochs=1, max_steps=STEPS,
    )  # fmt: skip
    numbers, autocast = itertools.count(), functools.partial(precision.context, "cpu")

    def call() -> float:
        number = next(numbers)
        with hooks.around(number):
            result = accumulate(way.loss, plan.micro_batches(number), seed=0, step=number, autocast=autocast)
            if hooks.penalty:
                hooks.penalty().backward()  # type: ignore[no-untyped-call]
            after = functools.partial(hooks.after_update, number) if hooks.after_update else None
            update(optimizer, trained.values(), lr=LR, clip=1.0, after=after)
        return result.loss

    return call


def examples(setting: Setting) -> TokenSet:
    """The rows as a run has them."""
    ids, learned = llama.rows(setting)
    return TokenSet.from_lists(ids.tolist(), learned.tolist(), [Origin("rows", i + 1) for i in range(len(ids))])


def save(shape: dict[str, Any], rank: int) -> Job:
    """Write an adapter on all linear layers."""
    model, folder = llama.hollow(Shape(**shape)), tempfile.mkdtemp()
    attach(model, LoRA(rank=rank))
    return Job(lambda: files.save(model, Path(folder), base=None), lambda _: {"mb": megabytes(Path(folder))})


def load(shape: dict[str, Any], rank: int) -> Job:
    """Read one into a model that has none; taking it out again, which a first use does not need, is timed as well."""
    model, folder = llama.hollow(Shape(**shape)), Path(tempfile.mkdtemp())
    attach(model, LoRA(rank=rank))
    files.save(model, folder, base=None)

    def call() -> None:
        detach(model)
        files.load(model, files.read(folder))

    return Job(call, lambda _: {"mb": megabytes(folder)})


def megabytes(folder: Path) -> float:
    """What lies in it."""
    return sum(file.stat().st_size for file in folder.iterdir()) / 1e6


def _trains(method: str, config: AdapterConfig) -> Any:
    if METHODS[method].result == "model":
        return "base"
    return "parts" if trained_parts(config) else "adapter"


if __name__ == "__main__":
    serve({"dtype": dtype, "step": step, "save": save, "load": load})
