"""What a tuning method does beside the gradient of its loss."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """Called by the loop; steps count from 0.

    Attributes:
        around: what holds during a step, from its forward until its gradients are gone.
        penalty: a scalar that is added to the loss of a step, once, whatever its examples are.
        after_update: told a step whose update was made, while its gradients are still there.
    """

    around: Callable[[int], contextlib.AbstractContextManager[None]] = lambda step: contextlib.nullcontext()
    penalty: Callable[[], Tensor] | None = None
    after_update: Callable[[int], None] | None = None
