"""Low-rank adaptation of a convolution: y = W * x + b + s B * (A * x), as PEFT has it.

A [r, in, k…] is a convolution like the base's with r outputs, B [out, r, 1…] mixes these; together they are one kernel,
W + s B A with A and B taken as matrices, [r, in · k…] and [out, r]. In a base with groups an output sees a part of the
input, and in B A all of it, which is no such base any more: refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn import functional as F
from typing_extensions import Self

from truetune.adapters.base import Change, LowRankUpdate
from truetune.adapters.lora import A, B, LoRAParams
from truetune.adapters.lora_start import FROM_WEIGHTS, Start, start
from truetune.adapters.standalone import Mergeable
from truetune.config.lora import LoRA
from truetune.errors import AdapterError
from truetune.ops import lowrank
from truetune.ops.dropout import dropped
from truetune.ops.frozen import FrozenLinear
from truetune.ops.rng import current_keys

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_MIX = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class LoRAConv(Mergeable):
    """A frozen ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d`` with a trained low-rank path beside it.

    Args:
        base: the convolution; its parameters stop requiring gradients.
        begun: where A and B start, as matrices.
        rank, alpha, dropout, rank_stabilised: as in ``LoRALinear``.
    Raises:
        AdapterError: a convolution with groups.
    """

    files = {"lora_a": A, "lora_b": B}  # noqa: RUF012 - ClassVar in the contract
    settings: ClassVar[type[LoRA]] = LoRA

    def __init__(
        self,
        base: nn.Conv1d | nn.Conv2d | nn.Conv3d,
        *,
        begun: Start,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        rank_stabilised: bool = False,
    ) -> None:
        super().__init__()
        if base.groups > 1:
            raise AdapterError(
                f"a convolution with {base.groups} groups takes no low-rank path: its outputs see parts of the input",
                ("way out", "leave it out of --targets"),
            )
        self.base: nn.Conv1d | nn.Conv2d | nn.Conv3d = base.requires_grad_(False)
        self.rank, self.alpha, self.rank_stabilised = rank, alpha, rank_stabilised
        self.dropout, self.site = dropout, 0
        self.lora_a = Parameter(begun.a.view(rank, *base.weight.shape[1:]))
        self.lora_b = Parameter(begun.b.view(-1, rank, *(1 for _ in base.kernel_size)))

    @classmethod
    def from_base(
        cls,
        base: nn.Conv1d | nn.Conv2d | nn.Conv3d,
        config: LoRA | None = None,
        *,
        generator: torch.Generator | None = None,
        **settings: Any,
    ) -> Self:
        """Wrap a convolution by the settings of a run, or by keywords: ``LoRAConv.from_base(conv, rank=8)``.

        Raises:
            ConfigError: a keyword that is no setting of ``LoRA``, or a value out of its range.
            AdapterError: groups, a bias beside B, or a start that looks at the base's weight.
        """
        config = cls.settings(**{**(config or cls.settings()).model_dump(), **settings})
        if config.lora_bias or config.init in FROM_WEIGHTS:
            flag = "--lora-bias" if config.lora_bias else f"--init {config.init}"
            raise AdapterError(f"{flag}: for linear layers, and not for convolutions")
        flat = FrozenLinear(base.weight.detach().flatten(1), transposed=False)
        return cls(base, begun=start(config.init, flat, config.rank, generator=generator), **cls.keywords(config))

    @classmethod
    def keywords(cls, config: Any) -> dict[str, Any]:
        """The arguments that come from the settings of a run."""
        return {
            "rank": config.rank,
            "alpha": config.alpha,
            "dropout": config.dropout,
            "rank_stabilised": config.use_rslora,
        }

    @property
    def scale(self) -> float:
        """s."""
        return lowrank.scale(self.alpha, self.rank, rank_stabilised=self.rank_stabilised)

    def update(self, own: Mapping[str, Tensor] | None = None) -> LowRankUpdate | None:
        """A [r, in, k…], B [out, r, 1…] and their scale."""
        a, b = (self.lora_a, self.lora_b) if own is None else (own[A], own[B])
        return LowRankUpdate(a, b, self.scale, kind="convolution")

    def forward(self, x: Tensor) -> Tensor:
        """As the base's, in the dtype of its output."""
        y: Tensor = self.base(x)
        return y if self.is_merged else self._beside(x, y).to(y.dtype)

    def _beside(self, x: Tensor, y: Tensor) -> Tensor:
        """The whole, of the base's input x and its output y."""
        return y + self._update(self._dropped(x))

    def _update(self, x: Tensor) -> Tensor:
        """Computes s B * (A * x)."""
        low = self.base._conv_forward(x, self.lora_a.to(x.dtype), None)
        mixed: Tensor = _MIX[len(self.base.kernel_size)](low, self.lora_b.to(low.dtype))
        return mixed * self.scale

    def _dropped(self, x: Tensor) -> Tensor:
        if not (self.dropout and self.training):
            return x
        flat = x.reshape(len(x), -1)
        return dropped(flat, self.dropout, current_keys(len(flat), x.device), self.site).view_as(x)

    def changes(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Change]:
        """W + s B A."""
        params = LoRAParams(a=tensors[A].flatten(1), b=tensors[B].flatten(1), scale=self.scale)
        return {"weight": lambda w: self.folded(w.flatten(1), params, tensors).view(w.shape)}

    def folded(self, weight: Tensor, params: LoRAParams, own: Mapping[str, Tensor]) -> Tensor:
        """The merged kernel as a matrix, [out, in · k…], rounded once; ``own`` are all tensors of the adapter."""
        return lowrank.fold(weight, params.a, params.b, params.scale)

    def merged_weight(self) -> Tensor:
        """W + s B A, [out, in, k…]."""
        weight = self.base.weight.detach()
        own = {suffix: tensor.detach() for suffix, tensor in self.own().items()}
        return weight.clone() if self.is_merged else self.changes(own)["weight"](weight)
