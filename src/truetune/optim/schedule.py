"""Learning rate as a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then a shape.

    Attributes:
        peak: the learning rate after the warm-up.
        total: optimizer steps of the whole run.
        warmup: steps of warm-up; the first step already learns, at ``peak / warmup``.
        shape: ``cosine`` and ``linear`` fall to (almost) 0 at the last step.
    """

    peak: float
    total: int
    warmup: int = 0
    shape: Literal["cosine", "linear", "constant"] = "cosine"

    def at(self, step: int) -> float:
        """The learning rate of step ``step``, counted from 0."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.total - self.warmup)
        if self.shape == "cosine":
            return self.peak * 0.5 * (1 + math.cos(math.pi * progress))
        return self.peak * (1 - progress) if self.shape == "linear" else self.peak


def warmup_steps(setting: float, total: int) -> int:
    """A share of all steps (rounded up) below 1, a number of steps from 1 on; never the whole run."""
    # 0.07 * 100 is 7.000000000000001: a rounding error is no eighth step.
    steps = math.ceil(round(setting * total, 6)) if setting < 1 else int(setting)
    return min(steps, max(0, total - 1))
