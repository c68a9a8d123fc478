"""A frozen weight as adapters see it: its sizes, its products, and its dense form [out, in], however it is stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from truetune.ops import buffers
from truetune.ops.probe import float32_prefers_onednn

_ROWS, _COLUMNS = 512, 1024


class FrozenWeight(Protocol):
    """The seam between adapters and bases: what a low-rank path needs of the weight it stands beside.

    Values only: whoever calls writes the backward.
    """

    @property
    def out_features(self) -> int:
        """Rows of W."""

    @property
    def in_features(self) -> int:
        """Columns of W."""

    @property
    def dtype(self) -> torch.dtype:
        """What ``x`` and ``g`` come in, and what the products are in."""

    @property
    def device(self) -> torch.device:
        """Where it is."""

    def dense(self) -> Tensor:
        """W as [out, in]; a weight that is stored in another form gives memory that its next call writes over."""

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[n, in] -> [n, out]: x Wᵀ + bias."""

    def matmul_t(self, g: Tensor, into: Tensor | None = None) -> Tensor:
        """[n, out] -> [n, in]: g W, the gradient of the input; with ``into`` [n, in], added to that in place."""


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' ``Conv1D`` (GPT-2), a linear map that keeps its weight as [in, out].

    Told by its class name and its ``nf`` field, because this layer must not import transformers.
    """
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


class OwnsFrozenWeight(Protocol):
    """A linear layer that keeps its weight in a form of its own, such as 4-bit codes."""

    def frozen_weight(self) -> FrozenWeight:
        """Its weight, as adapters see it."""


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear map that an adapter can stand beside."""
    return isinstance(module, nn.Linear) or is_conv1d(module) or hasattr(module, "frozen_weight")


def frozen_weight(module: nn.Module) -> FrozenWeight:
    """The weight of a linear layer, whatever form it is stored in."""
    if hasattr(module, "frozen_weight"):
        return cast(OwnsFrozenWeight, module).frozen_weight()
    return FrozenLinear.of(module)


def has_plain_products(module: nn.Module) -> bool:
    """Whether a layer computes ``x Wᵀ + b`` and nothing else; a subclass of ``nn.Linear`` may do more."""
    return type(module) is nn.Linear or is_conv1d(module) or hasattr(module, "frozen_weight")


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

    @property
    def dtype(self) -> torch.dtype:
        """The weight's own."""
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        """The weight's own."""
        return self.weight.device

    def dense(self) -> Tensor:
        """W as [out, in], in its own dtype; a view."""
        return self.weight.T if self.transposed else self.weight

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[n, in] -> [n, out]: x Wᵀ + bias."""
        y = _product(x, self.dense())
        return y if bias is None else y.add_(bias)

    def matmul_t(self, g: Tensor, into: Tensor | None = None) -> Tensor:
        """[n, out] -> [n, in]: g W; with ``into`` [n, in], added to that in place."""
        if into is None:
            return _product(g, self.dense().T)
        for part in _parts(g, self.in_features):
            into[part].addmm_(g[part], self.dense())
        return into


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """X [n, k] times the transpose of ``weight`` [m, k]."""
    if x.dtype == torch.float32 and x.device.type == "cpu" and float32_prefers_onednn():
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
        return product
    y = buffers.empty(len(x), len(weight), x.dtype, x.device)
    for part in _parts(x, len(weight)):
        torch.mm(x[part], weight.T, out=y[part])
    return y


def _parts(x: Tensor, columns: int) -> list[slice]:
    """The rows of a product at a time: all of them, but for narrow results in low precision on a CPU.

    oneDNN gives a product of more than 512 rows and fewer than 1,024 columns to one thread of two: 768 x 1536 x 576
    takes 1.5 ms whole, and 0.8 in halves.
    """
    rows = len(x)
    if x.dtype.itemsize > 2 or x.device.type != "cpu" or rows <= _ROWS or columns >= _COLUMNS:
        return [slice(None)]
    count = -(-rows // _ROWS)
    size = -(-rows // count // 64) * 64
    return [slice(start, start + size) for start in range(0, rows, size)]
