"""From hyper-parameters and a step's number to the scalars of that step.

The keys of a group are those of bitsandbytes' optimizers, so that a ``state_dict`` fits both: ``lr``, ``betas``,
``eps``, ``weight_decay``, and of AdEMAMix ``alpha``, ``t_alpha``, ``t_beta3``. RMSprop's smoothing constant and SGD's
momentum are the first of ``betas``. Scalars are computed in Python's float64; the kernels round them to float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from truetune.ops.update_rule import Rule

Group = Mapping[str, Any]


def adam(group: Group, t: int) -> Rule:
    """Adam (Kingma & Ba 2015, arXiv:1412.6980, end of section 2) with decoupled decay (arXiv:1711.05101).

    p ← (1 - lr wd) p - lr √c₂/c₁ · m / (√v + eps √c₂), where c = 1 - betaᵗ.
    """
    beta1, beta2 = group["betas"][:2]
    c1, root2 = 1 - beta1**t, math.sqrt(1 - beta2**t)
    return Rule(
        "adam", size=_lr(group) * root2 / c1, keep1=beta1, add1=1 - beta1, keep2=beta2, add2=1 - beta2,
        eps=group["eps"] * root2, decay=_decay(group),
    )  # fmt: skip


def ademamix(group: Group, t: int) -> Rule:
    """AdEMAMix (Pagliardini et al. 2024, arXiv:2409.03137, algorithm 1): Adam with a second, slower mean n.

    p ← (1 - lr wd) p - lr (m / c₁ + alpha n) / (√v / √c₂ + eps). Over ``t_alpha`` steps alpha grows linearly from 0,
    over ``t_beta3`` steps the half-life of n grows linearly from that of m.
    """
    beta1, beta2, beta3 = group["betas"]
    c1, root2 = 1 - beta1**t, math.sqrt(1 - beta2**t)
    alpha, t_alpha, t_beta3 = group["alpha"], group.get("t_alpha"), group.get("t_beta3")
    if t_alpha:
        alpha = min(t * alpha / t_alpha, alpha)
    if t_beta3:
        beta3 = min(_between(beta1, beta3, t / t_beta3), beta3)
    return Rule(
        "ademamix", size=_lr(group) * root2 / c1, keep1=beta1, add1=1 - beta1, keep2=beta2, add2=1 - beta2,
        keep3=beta3, add3=1 - beta3, mix=alpha * c1, eps=group["eps"] * root2, decay=_decay(group),
    )  # fmt: skip


def lion(group: Group, t: int) -> Rule:
    """Lion (Chen et al. 2023, arXiv:2302.06675, algorithm 2): p ← (1 - lr wd) p - lr sign(beta1 m + (1 - beta1) g)."""
    beta1, beta2 = group["betas"][:2]
    return Rule("lion", size=_lr(group), keep1=beta1, add1=1 - beta1, keep2=beta2, add2=1 - beta2, decay=_decay(group))


def momentum(group: Group, t: int) -> Rule:
    """Gradient descent with momentum (Polyak 1964; Sutskever et al. 2013): m ← mu m + g + wd p, p ← p - lr m."""
    return Rule("momentum", size=_lr(group), keep1=0.0 if t == 1 else group["betas"][0], l2=group["weight_decay"])


def rmsprop(group: Group, t: int) -> Rule:
    """RMSprop (Hinton 2012, lecture 6e), not centred: v ← alpha v + (1 - alpha) g², p ← p - lr g / (√v + eps)."""
    alpha = group["betas"][0]
    return Rule(
        "rms", size=_lr(group), keep2=alpha, add2=1 - alpha, eps=group["eps"], l2=group["weight_decay"]
    )  # fmt: skip


def adagrad(group: Group, t: int) -> Rule:
    """Adagrad (Duchi et al. 2011): v ← v + g², p ← p - lr g / (√v + eps)."""
    return Rule("rms", size=_lr(group), keep2=1.0, add2=1.0, eps=group["eps"], l2=group["weight_decay"])


def _lr(group: Group) -> float:
    return float(group["lr"])


def _decay(group: Group) -> float:
    return 1 - _lr(group) * float(group["weight_decay"])


def _between(slowest: float, fastest: float, share: float) -> float:
    """The decay rate whose half-life lies ``share`` of the way between two others' (the paper's equation for beta3)."""
    a, b = math.log(slowest), math.log(fastest)
    return math.exp(a * b / ((1 - share) * b + share * a))
