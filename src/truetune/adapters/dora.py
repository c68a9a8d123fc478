"""DoRA: a low-rank update of each row's direction, and its magnitude trained apart.

    y = m / |W + s B A| ∘ (W x + s B A x) + b       (Liu et al. 2024, arXiv:2402.09353, equation 5)

The norm is that of each row, taken as a constant of a step: it gets no gradient (section 4.3), and is formed anew only
when A or B has changed. m starts at it, so an untrained adapter changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from truetune.adapters.base import Adapter
from truetune.adapters.lora import LoRALinear, LoRAParams
from truetune.adapters.lora_embedding import LoRAEmbedding
from truetune.adapters.methods import Site
from truetune.adapters.row_norm import RowNorm, rescaled
from truetune.config.lora import DoRA, LoRA
from truetune.errors import AdapterError
from truetune.ops import lowrank
from truetune.ops.frozen import frozen_weight

M = "lora_magnitude_vector"


class DoRALinear(LoRALinear):
    """``LoRALinear`` with a trained magnitude for every output. Arguments as there.

    Args:
        drops_base: dropout drops the input of W too, where a magnitude that is not the norm adds to W x: PEFT's way.
    """

    files = {**LoRALinear.files, "lora_magnitude": M}  # noqa: RUF012 - ClassVar in the contract
    settings: ClassVar[type[LoRA]] = DoRA

    def __init__(self, base: nn.Module, *, rank: int, drops_base: bool = True, **settings: Any) -> None:
        super().__init__(base, rank=rank, **settings)
        self.drops_base = drops_base
        self.norm = RowNorm()
        self.lora_magnitude = Parameter(self._norm())

    def magnitude(self) -> Tensor:
        """[out]: m / |W + s B A|, and m where a row is zeros."""
        return ratio(self.lora_magnitude, self._norm())

    def _norm(self) -> Tensor:
        weight = frozen_weight(self.base)
        return self.norm.of(weight.dense, self.base, (self.lora_a, self.lora_b), self.low_rank, self.scale)

    def _beside(self, x: Tensor, y: Tensor) -> Tensor:
        """See ``LoRALinear``; W x is what the base adds to its bias."""
        low = self._dropped(x)
        update = lowrank.linear(low, *self.low_rank(), self.scale)
        of_base: Tensor = y if low is x or not self.drops_base else self.base(low)
        of_base = of_base if self.bias is None else of_base - self.bias
        magnitude = self.magnitude()
        return y + (magnitude - 1) * of_base + magnitude * update.to(y.dtype)

    def folded(self, weight: Tensor, params: LoRAParams, own: Mapping[str, Tensor]) -> Tensor:
        """The merged weight, [out, in], rounded once."""
        return rescaled(weight, params.a, params.b, params.scale, own[M])


class DoRAEmbedding(LoRAEmbedding):
    """``LoRAEmbedding`` with a trained magnitude for every dimension, as PEFT has it: the columns of the table."""

    files = {**LoRAEmbedding.files, "lora_magnitude": M}  # noqa: RUF012 - ClassVar in the contract
    settings: ClassVar[type[LoRA]] = DoRA

    def __init__(self, base: nn.Embedding, **settings: Any) -> None:
        super().__init__(base, **settings)
        self.norm = RowNorm()
        self.lora_magnitude = Parameter(self._norm())

    def magnitude(self) -> Tensor:
        """[dim]: m / |Wᵀ + s B A|."""
        return ratio(self.lora_magnitude, self._norm())

    def _norm(self) -> Tensor:
        pair = self.lora_a, self.lora_b
        return self.norm.of(lambda: self.base.weight.T, self.base, pair, lambda: pair, self.scale)

    def folded(self, weight: Tensor, params: LoRAParams, own: Mapping[str, Tensor]) -> Tensor:
        """The merged table, [vocab, dim], rounded once."""
        return rescaled(weight.T, params.a, params.b, params.scale, own[M]).T.contiguous()
