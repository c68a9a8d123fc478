"""Optimizers as their papers write them, in float64: a list of gradients in, the parameter after all of them out."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def adam(
    p: Tensor,
    gradients: Sequence[Tensor],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> Tensor:
    p, m, v = p.double(), torch.zeros_like(p).double(), torch.zeros_like(p).double()
    for t, g in enumerate(map(Tensor.double, gradients), 1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        p = p - lr * weight_decay * p - lr * (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
    return p


def lamb(p: Tensor, gradients: Sequence[Tensor], *, lr: float, weight_decay: float = 0.0) -> Tensor:
    """Adam whose update, before bias correction, is no longer than the parameter."""
    p, m, v = p.double(), torch.zeros_like(p).double(), torch.zeros_like(p).double()
    for t, g in enumerate(map(Tensor.double, gradients), 1):
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g * g
        root = math.sqrt(1 - 0.999**t)
        update = m / (v.sqrt() + 1e-8 * root)
        trust = min(1.0, float(p.norm() / update.norm())) if p.any() else 1.0
        p = p - lr * weight_decay * p - lr * root / (1 - 0.9**t) * trust * update
    return p


def ademamix(
    p: Tensor,
    gradients: Sequence[Tensor],
    *,
    lr: float,
    weight_decay: float = 0.0,
    alpha: float = 5.0,
    t_alpha: int | None = None,
    t_beta3: int | None = None,
) -> Tensor:
    beta1, beta2, last = 0.9, 0.999, 0.9999
    p = p.double()
    m, n, v = (torch.zeros_like(p) for _ in range(3))
    for t, g in enumerate(map(Tensor.double, gradients), 1):
        mix = min(t / t_alpha, 1.0) * alpha if t_alpha else alpha
        beta3 = last
        if t_beta3 and t < t_beta3:  # half-lives are linear in t
            half1, half3 = (math.log(0.5) / math.log(beta) for beta in (beta1, last))
            beta3 = 0.5 ** (1 / (half1 + (half3 - half1) * t / t_beta3))
        m = beta1 * m + (1 - beta1) * g
        n = beta3 * n + (1 - beta3) * g
        v = beta2 * v + (1 - beta2) * g * g
        update = (m / (1 - beta1**t) + mix * n) / ((v / (1 - beta2**t)).sqrt() + 1e-8)
        p = p - lr * weight_decay * p - lr * update
    return p


def lion(p: Tensor, gradients: Sequence[Tensor], *, lr: float, weight_decay: float = 0.0) -> Tensor:
    p, m = p.double(), torch.zeros_like(p).double()
    for g in map(Tensor.double, gradients):
        p = p - lr * weight_decay * p - lr * torch.sign(0.9 * m + 0.1 * g)
        m = 0.99 * m + 0.01 * g
    return p


def sgd(
    p: Tensor, gradients: Sequence[Tensor], *, lr: float, weight_decay: float = 0.0, max_unorm: float = math.inf
) -> Tensor:
    """With momentum 0.9; a finite ``max_unorm`` makes it LARS."""
    p, m = p.double(), torch.zeros_like(p).double()
    for g in map(Tensor.double, gradients):
        m = 0.9 * m + g + weight_decay * p
        p = p - lr * m * min(1.0, float(max_unorm * p.norm() / m.norm()))
    return p


def rmsprop(p: Tensor, gradients: Sequence[Tensor], *, lr: float, weight_decay: float = 0.0) -> Tensor:
    p, v = p.double(), torch.zeros_like(p).double()
    for g in map(Tensor.double, gradients):
        g = g + weight_decay * p
        v = 0.99 * v + 0.01 * g * g
        p = p - lr * g / (v.sqrt() + 1e-8)
    return p


def adagrad(p: Tensor, gradients: Sequence[Tensor], *, lr: float, weight_decay: float = 0.0) -> Tensor:
    p, v = p.double(), torch.zeros_like(p).double()
    for g in map(Tensor.double, gradients):
        g = g + weight_decay * p
        v = v + g * g
        p = p - lr * g / (v.sqrt() + 1e-10)
    return p
