"""Optimizers with one mean of gradients: SGD, LARS, Lion."""

from __future__ import annotations

from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from truetune.errors import ConfigError
from truetune.optim import rules
from truetune.optim.blockwise import BlockwiseOptimizer, Options


class _SGD(BlockwiseOptimizer):
    kind = "momentum"
    rule = staticmethod(rules.momentum)

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-2,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, _momentum_group(lr, momentum, weight_decay), options)


class SGD(_SGD):
    """Gradient descent with momentum, state in 32 bits; ``rules.momentum`` has the formula. Decay is L2."""

    bits = 32


class SGD8bit(_SGD):
    """Gradient descent with momentum, state in 8 bits; ``rules.momentum`` has the formula. Decay is L2."""

    bits = 8


class _LARS(BlockwiseOptimizer):
    kind = "momentum"
    rule = staticmethod(rules.momentum)

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-2,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        max_unorm: float = 0.02,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, _momentum_group(lr, momentum, weight_decay), options, max_unorm=max_unorm)


class LARS(_LARS):
    """LARS as bitsandbytes has it, state in 32 bits: SGD, each tensor's update a small share of the tensor.

    The momentum m of ``rules.momentum`` is scaled by min(1, max_unorm ‖p‖ / ‖m‖), where p is not zero. You et al. 2017
    (arXiv:1708.03888, equation 6) scale the gradient before the momentum, and lengthen it as well.
    """

    bits = 32


class LARS8bit(_LARS):
    """``LARS`` with state in 8 bits. The norms are taken in a pass of its own: bitsandbytes leaves them out here."""

    bits = 8


class _Lion(BlockwiseOptimizer):
    kind = "lion"
    rule = staticmethod(rules.lion)

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": 0.0, "weight_decay": weight_decay}, options)


class Lion(_Lion):
    """Lion with state in 32 bits; ``rules.lion`` has the formula. Its rate should be 3 to 10 times below Adam's."""

    bits = 32


class Lion8bit(_Lion):
    """Lion with state in 8 bits; ``rules.lion`` has the formula. Its rate should be 3 to 10 times below Adam's."""

    bits = 8


def _momentum_group(lr: float, momentum: float, weight_decay: float) -> dict[str, object]:
    if momentum == 0.0:
        raise ConfigError(
            "momentum: found 0, which leaves no state to keep", ("way out", "momentum=0.9, or torch.optim.SGD")
        )
    return {"lr": lr, "betas": (momentum, 0.0), "eps": 0.0, "weight_decay": weight_decay}
