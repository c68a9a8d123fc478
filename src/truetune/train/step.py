"""One optimizer step over any number of micro-batches.

The loss is divided by the trained tokens of the whole step, counted before the first backward; so neither the cut into
micro-batches nor packing changes it, beyond the order of summation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from truetune.data.pack import Batch
from truetune.errors import NonFiniteError
from truetune.ops.rng import derive_seed
from truetune.ops.threads import threads_for

Loss = Callable[[Batch], Tensor]  # the sum over the trained tokens of a micro-batch
UNTOUCHED = "the weights are as they were before this step"


@dataclass(frozen=True)
class StepResult:
    """What a step did."""

    loss: float  # mean over the step's trained tokens
    tokens: int
    trained_tokens: int


class NonFiniteStepError(NonFiniteError):
    """Something is not a number any more.

    ``step`` counts from 1, as in the log; 0 is before training. ``examples`` are the rows that were being learned.
    """

    def __init__(self, what: str, *, step: int, examples: Sequence[int]) -> None:
        super().__init__(what)
        self.step, self.examples = step, tuple(examples)


def accumulate(
    loss_of: Loss,
    batches: Sequence[Batch],
    *,
    seed: int,
    step: int,
    autocast: Callable[[], AbstractContextManager[object]],
) -> StepResult:
    """Forward and backward over the micro-batches of one step; gradients add up in the parameters.

    The masks of adapters derive from counters of the tokens; what a model drops on its own draws from (seed, step,
    micro-batch). So a resumed run sees the same masks.

    Raises:
        NonFiniteStepError: naming the examples of the first micro-batch whose loss is not finite.
    """
    count = sum(batch.trained for batch in batches)
    total = 0.0
    for index, batch in enumerate(batches):
        if not batch.trained:
            continue
        torch.manual_seed(derive_seed(seed, "dropout", step, index))
        with autocast():
            loss = loss_of(batch)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise NonFiniteStepError(f"the loss is not finite; {UNTOUCHED}", step=step + 1, examples=batch.examples)
        total += value
        (loss / count).backward()  # type: ignore[no-untyped-call]
    return StepResult(total / max(1, count), sum(b.tokens for b in batches), count)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed; torch has no class of its own for it on the CPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        words in str(error)
        for words in ("can't allocate memory", "not enough memory")  # Linux and macOS; Windows
    )


def update(
    optimizer: torch.optim.Optimizer,
    parameters: Iterable[Parameter],
    *,
    lr: float,
    clip: float,
    after: Callable[[], None] | None = None,
) -> float:
    """Clip, step, clear.

    Args:
        lr: of this step; a group with an ``lr_ratio`` has that many times as much.
        after: called behind the step, while the gradients are there.
    Returns:
        The gradient's norm before clipping; one that is not finite changes nothing.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if bool(torch.isfinite(norm)):
        if clip and gradients:
            torch._foreach_mul_(gradients, (clip / (norm + 1e-6)).clamp(max=1.0))
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_ratio", 1.0)
        with threads_for(gradients):
            optimizer.step()
            if after is not None:
                after()
    optimizer.zero_grad(set_to_none=True)
    return float(norm)
