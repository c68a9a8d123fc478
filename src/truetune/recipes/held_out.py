"""The loss on the held-out rows, during a run and of what it leaves."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from truetune.adapters.virtual import virtual_ids
from truetune.data.plan import StepPlan, sequential_batches
from truetune.eval.perplexity import Evaluation, evaluate
from truetune.models import forward
from truetune.recipes.setup import Setup


class HeldOut:
    """Called as the loop does, between steps; the last evaluation is kept."""

    def __init__(self, setup: Setup, way: forward.Path, plan: StepPlan) -> None:
        assert setup.prepared.held_out is not None
        self._rows = setup.prepared.held_out.behind(virtual_ids(way.model))
        self._way, self._plan = way, plan
        self._autocast = functools.partial(setup.precision.context, setup.device)
        self._last: Evaluation | None = None

    def __call__(self) -> tuple[float, int]:
        """``(mean loss, tokens)`` of the model as it is now."""
        found = self._last = self._evaluated()
        return found.loss, found.tokens

    def of_the_result(self, *, again: bool) -> Evaluation:
        """What was found last, unless the model has changed since, or there was no step left to do."""
        return self._evaluated() if again or self._last is None else self._last

    def _evaluated(self) -> Evaluation:
        batches = sequential_batches(self._rows, self._plan.micro_tokens, packing=self._plan.packing)
        with evaluating(self._way.model):
            return evaluate(self._way.scores, batches, autocast=self._autocast)


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Dropout off inside, as it was outside."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
