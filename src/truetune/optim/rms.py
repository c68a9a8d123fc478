"""Optimizers that divide a gradient by the root of a mean or sum of squares: RMSprop, Adagrad."""

from __future__ import annotations

from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from truetune.optim import rules
from truetune.optim.blockwise import BlockwiseOptimizer, Options


class _RMSprop(BlockwiseOptimizer):
    kind = "rms"
    rule = staticmethod(rules.rmsprop)

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-2,
        *,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": (alpha, 0.0), "eps": eps, "weight_decay": weight_decay}, options)


class RMSprop(_RMSprop):
    """RMSprop with state in 32 bits; ``rules.rmsprop`` has the formula. Decay is L2."""

    bits = 32


class RMSprop8bit(_RMSprop):
    """RMSprop with state in 8 bits; ``rules.rmsprop`` has the formula. Decay is L2."""

    bits = 8


class _Adagrad(BlockwiseOptimizer):
    kind = "rms"
    rule = staticmethod(rules.adagrad)

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-2,
        *,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.0, 0.0), "eps": eps, "weight_decay": weight_decay}, options)


class Adagrad(_Adagrad):
    """Adagrad with state in 32 bits; ``rules.adagrad`` has the formula. Decay is L2."""

    bits = 32


class Adagrad8bit(_Adagrad):
    """Adagrad with state in 8 bits; ``rules.adagrad`` has the formula. Decay is L2."""

    bits = 8
