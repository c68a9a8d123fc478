"""A frozen weight as adapters see it: its sizes, its products, and its dense form [out, in], however it is stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from truetune.ops import buffers


class FrozenWeight(Protocol):
    """The seam between adapters and bases: what a low-rank path needs of the weight it stands beside.

    Values only: whoever calls writes the backward.
    """

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[n, in] -> [n, out]: x Wᵀ + bias."""

    def matmul_t(self, g: Tensor, into: Tensor | None = None) -> Tensor:
        """[n, out] -> [n, in]: g W, the gradient of the input; with ``into`` [n, in], added to that in place."""


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' ``Conv1D`` (GPT-2), a linear map that keeps its weight as [in, out].

    Told by its class name and its ``nf`` field, because this layer must not import transformers.
    """
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear map that an adapter can stand beside."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


@dataclass(frozen=True)
class FrozenLinear:
    """View of a linear map ``y = W x + b`` that is not trained."""

    weight: Tensor  # as stored
    transposed: bool  # stored as [in, out]

    @classmethod
    def of(cls, module: nn.Module) -> FrozenLinear:
        """The view of an ``nn.Linear`` or a ``Conv1D``."""
        return cls(cast(Tensor, module.weight), is_conv1d(module))

    @property
    def out_features(self) -> int:
        """Rows of W."""
        return self.weight.shape[1 if self.transposed else 0]

    @property
    def in_features(self) -> int:
        """Columns of W."""
        return self.weight.shape[0 if self.transposed else 1]

    def dense(self) -> Tensor:
        """W as [out, in], in its own dtype; a view where it can be one."""
        return self.weight.T if self.transposed else self.weight

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[n, in] -> [n, out]: x Wᵀ + bias."""
        y = buffers.empty(len(x), self.out_features, x.dtype, x.device)
        torch.mm(x, self.dense().T, out=y)
        return y if bias is None else y.add_(bias)

    def matmul_t(self, g: Tensor, into: Tensor | None = None) -> Tensor:
        """[n, out] -> [n, in]: g W; with ``into`` [n, in], added to that in place."""
        if into is not None:
            return into.addmm_(g, self.dense())
        dx = buffers.empty(len(g), self.in_features, g.dtype, g.device)
        torch.mm(g, self.dense(), out=dx)
        return dx
