"""The norms of the rows of W + s B A, which DoRA divides by: kept until A, B or W change.

That they changed is told by the steps of torch's optimizers (whose fused kernels count no write), and for everybody
else by torch's count of what was written to a tensor, and by where it lies. Who writes through ``.data`` and is no
``torch.optim.Optimizer`` has to say so with ``torch.autograd.graph.increment_version``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from truetune.ops import lowrank

_State = tuple[object, ...]
_steps = 0  # of all optimizers in this process


@functools.cache
def _count_steps() -> None:
    def count(*_: Any) -> None:
        global _steps
        _steps += 1

    register_optimizer_step_post_hook(count)


class RowNorm:
    """One layer's."""

    def __init__(self) -> None:
        _count_steps()
        self._squares: tuple[_State, Tensor] | None = None
        self._norm: tuple[_State, Tensor] | None = None
        self._ratio: tuple[_State, Tensor] | None = None
        self._divisor: tuple[Tensor, Tensor] | None = None

    def of(
        self,
        weight: Callable[[], Tensor],
        base: nn.Module,
        trained: Iterable[Tensor],
        low_rank: Callable[[], tuple[Tensor, Tensor]],
        scale: float,
    ) -> Tensor:
        """|W + s B A|, [out] in float32 (float64 for float64), without a gradient.

        Args:
            weight: makes W dense, [out, in]; asked only when it is needed.
            base: the layer that has W.
            trained: what A and B are made of.
            low_rank: gives A [r, in] and B [out, r].
        """
        frozen = _state(base.parameters(recurse=False))
        state = (_steps, scale, *frozen, *_state(trained))
        if self._norm is None or self._norm[0] != state:
            with torch.inference_mode(False), torch.no_grad():
                dense = weight()
                if self._squares is None or self._squares[0] != frozen:
                    self._squares = frozen, lowrank.squared_rows(dense)
                self._norm = state, lowrank.row_norms(self._squares[1], dense, *low_rank(), scale)
        return self._norm[1]

    def ratio(self, magnitude: Tensor, norm: Tensor) -> Tensor:
        """m / |…|, [out], kept as well where it needs no gradient.

        Args:
            norm: from ``of``.
        """
        if self._divisor is None or self._divisor[0] is not norm:
            with torch.inference_mode(False), torch.no_grad():
                self._divisor = norm, _divisor(norm)
        if torch.is_grad_enabled() and magnitude.requires_grad:
            return magnitude / self._divisor[1]
        state = (_steps, *_state((magnitude, norm)))
        if self._ratio is None or self._ratio[0] != state:
            with torch.inference_mode(False), torch.no_grad():
                self._ratio = state, magnitude / self._divisor[1]
        return self._ratio[1]


def _divisor(norm: Tensor) -> Tensor:
    """1 for a row of zeros, which has no direction and gives 0 whatever it is divided by."""
    return torch.where(norm > 0, norm, 1)


def rescaled(weight: Tensor, a: Tensor, b: Tensor, scale: float, magnitude: Tensor) -> Tensor:
    """m / |W + s B A| ∘ (W + s B A), [out, in] in the dtype of ``weight``, rounded once.

    Args:
        weight: [out, in], any floating dtype. Not modified.
        a: [r, in].
        b: [out, r].
        magnitude: [out].
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    norm = lowrank.row_norms(lowrank.squared_rows(wide), wide, a, b, scale)
    factor = magnitude.to(wide.dtype) / _divisor(norm)
    return (lowrank.fold(wide, a, b, scale) * factor[:, None]).to(weight.dtype)


def _state(tensors: Iterable[Tensor]) -> _State:
    return tuple((t.data_ptr(), t._version, t.dtype, t.device) for t in tensors)
