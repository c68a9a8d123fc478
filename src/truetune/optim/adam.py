"""Adam and its kin: a mean of gradients over the root of a mean of their squares."""

from __future__ import annotations

from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from truetune.optim import rules
from truetune.optim.blockwise import BlockwiseOptimizer, Options

Betas = tuple[float, float]
_NO_MIX = {"alpha": 0.0, "t_alpha": None, "t_beta3": None}  # bitsandbytes keeps these in every such group


class _Adam(BlockwiseOptimizer):
    kind = "adam"
    rule = staticmethod(rules.adam)

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        *,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        group = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **_NO_MIX}
        super().__init__(params, group, options)


class Adam(_Adam):
    """Adam with state in 32 bits; ``rules.adam`` has the formula. Its decay is decoupled, as in bitsandbytes."""

    bits = 32


class Adam8bit(_Adam):
    """Adam with state in 8 bits; ``rules.adam`` has the formula. Its decay is decoupled, as in bitsandbytes."""

    bits = 8


class _AdamW(BlockwiseOptimizer):
    kind = "adam"
    rule = staticmethod(rules.adam)

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        *,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **options: Unpack[Options],
    ) -> None:
        group = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **_NO_MIX}
        super().__init__(params, group, options)


class AdamW(_AdamW):
    """Adam with state in 32 bits, and a little decay by default; ``rules.adam`` has the formula."""

    bits = 32


class AdamW8bit(_AdamW):
    """Adam with state in 8 bits, and a little decay by default; ``rules.adam`` has the formula."""

    bits = 8


class _LAMB(BlockwiseOptimizer):
    kind = "adam"
    rule = staticmethod(rules.adam)

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        *,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_unorm: float = 1.0,
        **options: Unpack[Options],
    ) -> None:
        group = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **_NO_MIX}
        super().__init__(params, group, options, max_unorm=max_unorm)


class LAMB(_LAMB):
    """LAMB as bitsandbytes has it, with state in 32 bits: Adam, each tensor's update no longer than the tensor.

    The direction u of ``rules.adam`` is scaled by min(1, max_unorm ‖p‖ / ‖u‖), where p is not zero. You et al. 2020
    (arXiv:1904.00962, algorithm 2) scale by ‖p‖ / ‖u‖ whichever is larger, which lengthens short updates too.
    """

    bits = 32


class LAMB8bit(_LAMB):
    """``LAMB`` with state in 8 bits. The norms are taken in a pass of its own: bitsandbytes leaves them out here."""

    bits = 8


class _AdEMAMix(BlockwiseOptimizer):
    kind = "ademamix"
    rule = staticmethod(rules.ademamix)

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **options: Unpack[Options],
    ) -> None:
        group = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
                 "alpha": alpha, "t_alpha": t_alpha, "t_beta3": t_beta3}  # fmt: skip
        super().__init__(params, group, options)


class AdEMAMix(_AdEMAMix):
    """AdEMAMix with state in 32 bits; ``rules.ademamix`` has the formula.

    ``t_alpha`` and ``t_beta3`` are the steps over which the slow mean comes in: usually those of the whole run.
    """

    bits = 32


class AdEMAMix8bit(_AdEMAMix):
    """``AdEMAMix`` with state in 8 bits."""

    bits = 8
