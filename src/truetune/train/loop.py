"""The page: from the first step to the last.

Every step is a function of its number: the examples, their cut into micro-batches, the learning rate and the dropout
masks. So a run that was stopped anywhere goes on from a step number and ends with the very same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch.nn import Parameter

from truetune.checkpoint.run_state import Progress
from truetune.data.plan import StepPlan
from truetune.errors import OutOfMemoryError, StoppedError
from truetune.optim.schedule import Schedule
from truetune.train.hooks import Hooks
from truetune.train.log import RunLog
from truetune.train.memory import peak_mb
from truetune.train.step import UNTOUCHED, Loss, NonFiniteStepError, StepResult, accumulate, is_out_of_memory, update
from truetune.train.stop import StopRequest


@dataclass(frozen=True, kw_only=True)
class Run:
    """All that the loop needs, put together by a recipe."""

    plan: StepPlan
    schedule: Schedule
    loss_of: Loss
    parameters: list[Parameter]
    optimizer: torch.optim.Optimizer
    autocast: Callable[[], AbstractContextManager[object]]
    clip: float
    seed: int
    save_every: int
    eval_every: int
    evaluate: Callable[[], tuple[float, int]] | None  # -> (mean held-out loss, tokens)
    save: Callable[[Progress], None]
    out_of_memory: Callable[[int], None]  # told the new number of tokens per micro-batch
    log: RunLog
    hooks: Hooks = field(default_factory=Hooks)


def train(run: Run, progress: Progress) -> Progress:
    """Run all steps that are left.

    Returns:
        The final progress; its checkpoint is saved.
    Raises:
        NonFiniteStepError: before anything that is not a number is saved.
        StoppedError: a signal came; the state is saved.
    """
    with StopRequest() as stop:
        if run.evaluate and progress.first_loss is None:
            progress = _evaluated(run, progress)
        while progress.step < run.plan.steps:
            progress = _step(run, progress)
            last = progress.step == run.plan.steps
            if run.evaluate and (last or _due(run.eval_every, progress.step)):
                progress = _evaluated(run, progress)
            is_best = progress.best_step == progress.step
            if last or is_best or stop.signal or _due(run.save_every, progress.step):
                _save(run, progress)
            if stop.signal and not last:
                raise StoppedError(
                    stop.signal,
                    f"stopped after step {progress.step} of {run.plan.steps}; the state is saved",
                    ("go on", "run the same command again with --resume auto"),
                )
    return progress


def _step(run: Run, progress: Progress) -> Progress:
    step = progress.step  # counted from 0 here, from 1 in the log
    rate, after = run.schedule.at(step), run.hooks.after_update
    with run.hooks.around(step):
        result = _accumulated(run, step)
        if run.hooks.penalty:
            run.hooks.penalty().backward()  # type: ignore[no-untyped-call]
        norm = update(
            run.optimizer, run.parameters, lr=rate, clip=run.clip, after=partial(after, step) if after else None
        )
    if not math.isfinite(norm):
        what = f"the gradient is not finite; {UNTOUCHED}"
        raise NonFiniteStepError(what, step=step + 1, examples=run.plan.examples(step))
    run.log.step(step + 1, _row(result, rate, norm, run.parameters[0].device.type))
    return replace(
        progress,
        step=step + 1,
        tokens=progress.tokens + result.tokens,
        trained_tokens=progress.trained_tokens + result.trained_tokens,
    )


def _accumulated(run: Run, step: int) -> StepResult:
    """The step's gradient, in smaller micro-batches if memory runs out: what it is does not depend on the cut."""
    while True:
        batches = run.plan.micro_batches(step)
        try:
            return accumulate(run.loss_of, batches, seed=run.seed, step=step, autocast=run.autocast)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            largest = max(batch.input_ids.numel() for batch in batches)
            if all(len(batch.examples) == 1 for batch in batches):
                raise OutOfMemoryError(largest) from None
        # Only here is the failed attempt's memory free: the exception held its frames.
        for parameter in run.parameters:
            parameter.grad = None
        run.plan.micro_tokens = max(1, min(run.plan.micro_tokens, largest) // 2)
        run.out_of_memory(run.plan.micro_tokens)


def _row(result: StepResult, rate: float, norm: float, device: str) -> dict[str, float | int]:
    return {
        "loss": result.loss,
        "tokens": result.tokens,
        "trained_tokens": result.trained_tokens,
        "lr": rate,
        "grad_norm": norm,
        "peak_mb": round(peak_mb(device), 1),
    }


def _evaluated(run: Run, progress: Progress) -> Progress:
    assert run.evaluate is not None
    loss, tokens = run.evaluate()
    if not math.isfinite(loss):
        raise NonFiniteStepError("the held-out loss is not finite", step=progress.step, examples=())
    run.log.evaluation(progress.step, loss, tokens)
    if progress.first_loss is None:
        progress = replace(progress, first_loss=loss)
    if progress.step and (progress.best_loss is None or loss < progress.best_loss):
        progress = replace(progress, best_step=progress.step, best_loss=loss)
    return progress


def _save(run: Run, progress: Progress) -> None:
    """Save, unless the last step threw a weight out of its range: the next loss would tell, but too late."""
    if not all(bool(torch.isfinite(parameter).all()) for parameter in run.parameters):
        rows = run.plan.examples(progress.step - 1)
        raise NonFiniteStepError(
            "a weight is no longer finite, so this state is not saved", step=progress.step, examples=rows
        )
    run.log.sync()
    run.save(progress)


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0
