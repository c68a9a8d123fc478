"""Low-rank adaptation of a linear map: y = W x + b + s B A x.  Hu et al. 2021, arXiv:2106.09685, section 4.

W [out, in] is frozen and may be stored in any form: this file only calls its layer.
A [r, in] starts random, B [out, r] starts at zero, so an untrained adapter changes nothing.
Both are kept in float32 and cast at use: bf16 has too few bits to add small updates to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from truetune.adapters.base import Adapter
from truetune.config.lora import LoRA
from truetune.ops import lowrank
from truetune.ops.dropout import dropped
from truetune.ops.frozen import FrozenLinear, is_conv1d
from truetune.ops.projection import Group, Projection, project
from truetune.ops.rng import current_keys


@dataclass(frozen=True, kw_only=True)
class LoRAParams:
    """The trained tensors of one site, as the adapter file holds them."""

    a: Tensor  # [r, in]
    b: Tensor  # [out, r]
    scale: float


def merge(weight: Tensor, bias: Tensor | None, params: LoRAParams) -> tuple[Tensor, Tensor | None]:
    """Fold the adapter into a dense weight: W + s B A, rounded once.

    Args:
        weight: [out, in], any floating dtype. Not modified.
        bias: [out] or None; LoRA leaves it alone.
    Returns:
        New (weight, bias) in the dtype of ``weight``.
    """
    return lowrank.fold(weight, params.a, params.b, params.scale), bias


class LoRALinear(Adapter):
    """A frozen linear layer (``nn.Linear``, or GPT-2's ``Conv1D``) with a trained low-rank path beside it.

    Args:
        base: the layer; its parameters stop requiring gradients.
        rank: r.
        alpha: the update is multiplied by alpha / r.
        dropout: applied to the low-rank path's input while training.
        rank_stabilised: alpha / sqrt(r) instead.
        generator: draws A; the default draws from torch's global one.
    """

    files = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}  # noqa: RUF012 - ClassVar in the contract

    def __init__(
        self,
        base: nn.Module,
        *,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        rank_stabilised: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.dropout = dropout
        self.site = 0  # tells this layer's dropout masks from another's
        self.scale = lowrank.scale(alpha, rank, rank_stabilised=rank_stabilised)
        frozen = FrozenLinear.of(base)
        a = torch.empty(rank, frozen.in_features)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)  # U(±1/sqrt(in)), as nn.Linear
        device = frozen.weight.device
        self.lora_a = nn.Parameter(a.to(device))
        self.lora_b = nn.Parameter(torch.zeros(frozen.out_features, rank, device=device))

    @classmethod
    def from_base(
        cls, base: nn.Module, config: LoRA | None = None, *, generator: torch.Generator | None = None, **settings: Any
    ) -> Self:
        """Wrap a layer by the settings of a run, or by keywords: ``LoRALinear.from_base(linear, rank=8)``.

        Raises:
            ConfigError: a keyword that is no setting of ``LoRA``, or a value out of its range.
        """
        config = LoRA(**{**(config or LoRA()).model_dump(), **settings})
        return cls(
            base,
            rank=config.rank,
            alpha=config.alpha,
            dropout=config.dropout,
            rank_stabilised=config.use_rslora,
            generator=generator,
        )

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in the dtype of the base's output."""
        rows = x.shape[:-1].numel()
        group = projection_group((self,), rows)
        if group is not None and x.dtype == self.weight.dtype and not torch.is_autocast_enabled(x.device.type):
            (out,) = project(group, x.reshape(rows, x.shape[-1]))
            return out.view(*x.shape[:-1], out.shape[1])
        low = self._dropped(x, rows)
        y: Tensor = self.base(x)
        return y + lowrank.linear(low, self.lora_a, self.lora_b, self.scale).to(y.dtype)

    def _dropped(self, x: Tensor, rows: int) -> Tensor:
        if not (self.dropout and self.training):
            return x
        flat = x.reshape(rows, x.shape[-1])
        return dropped(flat, self.dropout, current_keys(rows, x.device), self.site).view_as(x)

    def params(self) -> LoRAParams:
        """The trained tensors and their scale."""
        return LoRAParams(a=self.lora_a.detach(), b=self.lora_b.detach(), scale=self.scale)

    def merged_weight(self) -> Tensor:
        """W + s B A, stored as the base stores W."""
        frozen = FrozenLinear.of(self.base)
        merged, _ = merge(frozen.dense().detach(), None, self.params())
        return merged.T.contiguous() if frozen.transposed else merged


def projection_group(modules: Sequence[nn.Module], tokens: int) -> Group | None:
    """Linear maps of one input as one node of the graph; None where one of them is trained itself, or of another kind.

    Args:
        modules: frozen linear layers, adapted or not.
        tokens: rows of the input, for the dropout masks.
    """
    projections = [_projection(module) for module in modules]
    adapted = [m for m in modules if isinstance(m, LoRALinear)]
    if not all(projections) or len({(m.dropout, m.training) for m in adapted}) > 1:
        return None
    found = tuple(p for p in projections if p is not None)
    if not (adapted and adapted[0].dropout and adapted[0].training):
        return Group(found)
    return Group(found, adapted[0].dropout, current_keys(tokens, adapted[0].weight.device), adapted[0].site)


def _projection(module: nn.Module) -> Projection | None:
    base = module.base if isinstance(module, LoRALinear) else module
    # A subclass of nn.Linear may keep its weight in a form of its own.
    if not (type(base) is nn.Linear or is_conv1d(base)) or any(p.requires_grad for p in base.parameters()):
        return None
    bias = base.bias if isinstance(base.bias, Tensor) else None
    if not isinstance(module, LoRALinear):
        return Projection(FrozenLinear.of(base), bias)
    return Projection(FrozenLinear.of(base), bias, module.lora_a, module.lora_b, module.scale)
