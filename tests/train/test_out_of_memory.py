"""Where memory runs out, a step is cut smaller, and its result is what it would have been."""

from __future__ import annotations

import contextlib
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_models import adapted
from step_models import LENGTHS, rows
from truetune.checkpoint.run_state import Progress
from truetune.data.pack import Batch
from truetune.data.plan import StepPlan
from truetune.errors import OutOfMemoryError, TruetuneError
from truetune.models.forward import Path as Way
from truetune.models.forward import prepared
from truetune.models.survey import survey
from truetune.optim.adamw import adamw
from truetune.optim.schedule import Schedule
from truetune.train.log import RunLog, Screen
from truetune.train.loop import Run, train
from truetune.train.step import Loss, is_out_of_memory

STEPS, EVERYTHING, LONGEST = 3, sum(LENGTHS), max(LENGTHS)
ERRORS: dict[str, Callable[[], BaseException]] = {
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: ..."),
    "python": MemoryError,
}
Failing = Callable[[Loss], Loss]


def run(folder: Path, failing: Failing, micro_tokens: int, *, packing: bool = True) -> dict[str, Any]:
    """Three steps of all eight rows, with dropout; what was learned, logged and told."""
    model = adapted("llama", dropout=0.3)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    plan = StepPlan.build(
        rows(), batch_size=len(LENGTHS), micro_tokens=micro_tokens, packing=packing, seed=0, epochs=STEPS,
        max_steps=None,
    )  # fmt: skip
    way, told = Way(model, survey(model), packing), list[int]()
    folder.mkdir()
    log = RunLog(folder / "log.jsonl", Screen(), steps=STEPS, start=0, every=1)
    with log, prepared(way, recompute="cheap"):
        settings = Run(
            plan=plan, schedule=Schedule(0.01, STEPS), loss_of=failing(way.loss), parameters=list(parameters.values()),
            optimizer=adamw(parameters, lr=0.01, weight_decay=0.0), autocast=contextlib.nullcontext, clip=1.0, seed=0,
            save_every=0, eval_every=0, evaluate=None, save=lambda _: None, out_of_memory=told.append, log=log,
        )  # fmt: skip
        progress = train(settings, Progress())
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [(line["loss"], line["grad_norm"]) for line in lines]
    learned = {name: p.detach() for name, p in parameters.items()}
    return {"learned": learned, "losses": losses, "told": told, "progress": progress, "budget": plan.micro_tokens}


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["losses"] == other["losses"]
    assert one["progress"] == other["progress"]
    assert all(torch.equal(one["learned"][name], other["learned"][name]) for name in other["learned"])


def nowhere(loss_of: Loss) -> Loss:
    return loss_of


def above(tokens: int, error: Callable[[], BaseException] = ERRORS["cpu"]) -> Failing:
    """Memory ends at so many tokens, padding counted."""

    def failing(loss_of: Loss) -> Loss:
        def limited(batch: Batch) -> Tensor:
            if batch.input_ids.numel() > tokens:
                raise error()
            return loss_of(batch)

        return limited

    return failing


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("error", ERRORS)
def test_a_step_that_does_not_fit_is_cut_until_it_does(error: str, packing: bool, tmp_path: Path) -> None:
    found = run(tmp_path / "cut", above(LONGEST, ERRORS[error]), 10 * LONGEST, packing=packing)
    assert found["budget"] == found["told"][-1] <= LONGEST
    assert found["told"] == sorted(set(found["told"]), reverse=True)
    assert found["progress"].step == STEPS
    assert_same(found, run(tmp_path / "small", nowhere, found["budget"], packing=packing))


def test_the_first_cut_halves_what_was_there_and_not_what_was_allowed(tmp_path: Path) -> None:
    found = run(tmp_path / "cut", above(EVERYTHING - 1), 10**9)
    assert found["told"] == [EVERYTHING // 2]


def test_a_run_that_fits_is_not_cut(tmp_path: Path) -> None:
    assert run(tmp_path / "whole", above(EVERYTHING), EVERYTHING)["told"] == []


def test_a_cut_changes_no_result_beyond_rounding(tmp_path: Path) -> None:
    cut, whole = run(tmp_path / "cut", above(LONGEST), EVERYTHING), run(tmp_path / "whole", nowhere, EVERYTHING)
    losses = [[loss for loss, _ in each["losses"]] for each in (cut, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def in_the_backward(number: int) -> Failing:
    """Memory ends in the backward of the ``number``-th micro-batch, when most gradients of it are there already."""
    calls = iter(range(1, 1000))

    class Full(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    def failing(loss_of: Loss) -> Loss:
        def limited(batch: Batch) -> Tensor:
            loss = loss_of(batch)
            return Full.apply(loss) + loss if next(calls) == number else loss  # type: ignore[no-untyped-call, no-any-return]

        return limited

    return failing


@pytest.mark.parametrize("number", [1, 2, 3])
def test_gradients_of_an_attempt_that_failed_half_way_are_forgotten(number: int, tmp_path: Path) -> None:
    found = run(tmp_path / "cut", in_the_backward(number), LONGEST)
    assert len(found["told"]) == 1
    assert_same(found, run(tmp_path / "small", nowhere, found["budget"]))


def test_a_failed_attempt_s_memory_is_free_before_the_next(tmp_path: Path) -> None:
    held: list[weakref.ref[Tensor]] = []
    alive: list[bool] = []

    def failing(loss_of: Loss) -> Loss:
        def limited(batch: Batch) -> Tensor:
            alive.extend(ref() is not None for ref in held)
            activations = torch.zeros(3)
            if not held:
                held.append(weakref.ref(activations))
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return loss_of(batch)

        return limited

    run(tmp_path / "cut", failing, EVERYTHING)
    assert alive
    assert not any(alive)


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_a_single_example_that_does_not_fit_ends_the_run_with_a_way_out(packing: bool, tmp_path: Path) -> None:
    with pytest.raises(OutOfMemoryError) as caught:
        run(tmp_path / "o", above(LONGEST - 1), EVERYTHING, packing=packing)
    assert isinstance(caught.value, TruetuneError)
    assert caught.value.exit_code == 3
    assert f"a single example of {LONGEST} tokens" in str(caught.value)
    assert "--max-length" in dict(caught.value.notes)["way out"]


@pytest.mark.parametrize(
    "error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("no")], ids=repr
)
def test_other_errors_pass(error: Exception, tmp_path: Path) -> None:
    def failing(_: Loss) -> Loss:
        def raising(batch: Batch) -> Tensor:
            raise error

        return raising

    with pytest.raises(type(error)) as caught:
        run(tmp_path / "o", failing, EVERYTHING)
    assert caught.value is error


def test_what_torch_itself_says_when_memory_ends_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("index out of range"))
