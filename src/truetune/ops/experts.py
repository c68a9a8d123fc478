"""Experts that a model keeps as stacks of matrices, one expert's after another's, and the tokens that are routed to
them: y_t = Σ_e p_te E_e(x_t) over the experts chosen for a token (Shazeer et al. 2017, arXiv:1701.06538, equation 2).

Only experts that got tokens are computed; a stack that is stored in another form is made dense one of them at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from truetune.ops.frozen import FrozenLinear, FrozenWeight
from truetune.ops.projection import Group, Projection, project

GATED, PLAIN, LAST = "gate_up_proj", "up_proj", "down_proj"
"""What transformers' interface of experts calls the first map, with or without a gate, and the second."""

INTERFACE = ("has_gate", "has_bias", "is_transposed", "num_experts")

Product = Callable[[str, int, Tensor], Tensor]
"""(the map's name, the expert, x [n, in]) -> [n, out], without the bias."""


def follows_interface(module: nn.Module) -> bool:
    """Whether a module of experts computes what ``expert`` does, with these fields to say how."""
    return all(hasattr(module, name) for name in INTERFACE)


class OwnsStacks(Protocol):
    """A module of experts that keeps some of its stacks in a form of its own, such as 4-bit codes."""

    def is_packed(self, name: str) -> bool:
        """Whether a parameter now is such a stack; all others are as in any module."""

    def frozen_expert(self, name: str, e: int) -> FrozenWeight:
        """One expert's matrix of a packed stack."""

    def dense(self, name: str) -> Tensor:
        """A packed stack as the base has it, in memory of its own."""


def _owner(module: nn.Module, name: str) -> OwnsStacks | None:
    owner = cast(OwnsStacks, module)
    return owner if hasattr(module, "frozen_expert") and owner.is_packed(name) else None


def frozen_expert(module: nn.Module, name: str, e: int) -> FrozenWeight:
    """One expert's matrix, in whatever form its stack is stored; of a parameter that is a matrix alone, all of it."""
    if owner := _owner(module, name):
        return owner.frozen_expert(name, e)
    stack: Tensor = getattr(module, name).detach()
    transposed = stack.ndim == 3 and bool(getattr(module, "is_transposed", False))
    return FrozenLinear(stack[e] if stack.ndim == 3 else stack, transposed)


def dense_parameter(module: nn.Module, name: str) -> Tensor:
    """A parameter as numbers that can be added to: itself, or what a packed stack stands for."""
    owner = _owner(module, name)
    return owner.dense(name) if owner else cast(Tensor, getattr(module, name))


def product(module: nn.Module, name: str, e: int, x: Tensor) -> Tensor:
    """[n, in] -> [n, out] in the dtype of ``x``: x W_eᵀ, with the gradient of ``x``."""
    if owner := _owner(module, name):
        weight = owner.frozen_expert(name, e)
        (y,) = project(Group((Projection(weight, None),)), x.to(weight.dtype))
        return y.to(x.dtype)
    stack = getattr(module, name)
    return F.linear(x, stack[e].T if module.is_transposed else stack[e])


def expert(module: nn.Module, e: int, x: Tensor, of: Product) -> Tensor:
    """[n, hidden] -> [n, hidden] of one expert, whose products are ``of``'s."""
    base: Any = module
    first = GATED if base.has_gate else PLAIN
    inner = _biased(base, first, e, of(first, e, x))
    inner = base._apply_gate(inner) if base.has_gate else base.act_fn(inner)
    y = _biased(base, LAST, e, of(LAST, e, inner))
    return cast(Tensor, base.post_expert_norm(y)) if getattr(base, "has_post_expert_norm", False) else y


def _biased(base: Any, name: str, e: int, y: Tensor) -> Tensor:
    return y + getattr(base, f"{name}_bias")[e] if base.has_bias else y


def routed(hidden: Tensor, chosen: Tensor, shares: Tensor, count: int, of: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Tokens sorted by expert, each expert's together, and back.

    Args:
        hidden: [tokens, hidden].
        chosen: [tokens, k] int64, the experts of each token.
        shares: [tokens, k], what their outputs are multiplied by.
        count: of experts.
        of: (e, x [n, hidden]) -> [n, hidden].
    Returns:
        [tokens, hidden] in the dtype of ``hidden``; zeros where no token has an expert.
    """
    ids = chosen.reshape(-1)
    if not len(ids):
        return hidden.new_zeros(hidden.shape)
    order = torch.argsort(ids, stable=True)
    counts = torch.bincount(ids, minlength=count).tolist()
    rows = torch.split(hidden[order // chosen.shape[-1]], counts)
    outputs = torch.cat([of(e, x) for e, x in enumerate(rows) if len(x)])
    weighted = outputs * shares.reshape(-1, 1)[order]
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return weighted[back].view(*chosen.shape, -1).sum(1).to(hidden.dtype)
