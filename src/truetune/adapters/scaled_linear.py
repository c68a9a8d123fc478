"""Trained bias and scale of a frozen linear map.  LLaMA-Adapter V2, Gao et al. 2023, arXiv:2304.15010, section 3.1.

    y = s · (W x + b)

b [out] starts at zero and s [out] at one, so an untrained adapter changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from typing_extensions import Self

from truetune.adapters.base import Adapter
from truetune.errors import AdapterError
from truetune.ops.frozen import frozen_weight

BIAS, SCALE = "adapter_bias", "adapter_scale"


class OutputScale(nn.Module):
    """b and s of one map, in float32: a step next to one is lost in bf16."""

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__()
        self.shift = Parameter(torch.zeros(width, device=device))
        self.factor = Parameter(torch.ones(width, device=device))

    @classmethod
    def of(cls, layer: nn.Module) -> Self:
        """Those of a linear layer, however its weight is stored."""
        frozen = frozen_weight(layer)
        return cls(frozen.out_features, frozen.device)

    def forward(self, y: Tensor) -> Tensor:
        """[..., out] -> [..., out], in the same dtype."""
        return ((y + self.shift) * self.factor).to(y.dtype)

    def named(self, prefix: str = "") -> Iterator[tuple[str, Parameter]]:
        """``(suffix in the file, parameter)``."""
        yield prefix + BIAS, self.shift
        yield prefix + SCALE, self.factor


class ScaledLinear(Adapter):
    """A frozen linear layer with a trained bias and scale behind it."""

    files = {}  # noqa: RUF012 - ClassVar in the contract

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.behind = OutputScale.of(base)

    def adapter_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """b and s."""
        yield from self.behind.named()

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in the dtype of the base's output."""
        y: Tensor = self.behind(self.base(x))
        return y

    def merged_weight(self) -> Tensor:
        """Raises AdapterError: it comes with prompts, which fold into nothing."""
        raise AdapterError("LLaMA-Adapter V2 does not fold into weights: serve it beside the base")
