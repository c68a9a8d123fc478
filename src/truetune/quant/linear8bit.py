"""A linear layer of LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339): int8 rows, int8 products, outliers apart."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from truetune.errors import QuantizationError
from truetune.ops import buffers, int8
from truetune.ops.frozen import FrozenLinear
from truetune.quant.base import QuantLinear

_dense_products: ContextVar[bool] = ContextVar("dense_products", default=False)


@contextlib.contextmanager
def unrounded() -> Iterator[None]:
    """Inside, inputs are not rounded to 8 bits: products are those with the dense weight.

    For comparing two ways through a model: an input's last bit can decide what it is rounded to, and the outliers of
    one row which columns of the others are.
    """
    token = _dense_products.set(True)
    try:
        yield
    finally:
        _dense_products.reset(token)


@dataclass(frozen=True)
class FrozenLinear8bit:
    """The seam's view of int8 rows."""

    codes: Tensor  # int8 [out, in]
    scale: Tensor  # float32 [out], the rows' largest magnitudes
    threshold: float
    dtype: torch.dtype

    @property
    def out_features(self) -> int:
        """Rows of W."""
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of W."""
        return self.codes.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.codes.device

    def dense(self) -> Tensor:
        """[out, in], in memory that the next call on any layer writes over."""
        out = buffers.scratch(self.out_features, self.in_features, self.dtype, self.device)
        return int8.dequantize_rows(self.codes, self.scale, dtype=self.dtype, out=out)

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[n, in] -> [n, out]: x Wᵀ + bias, x quantised by rows but for its outlier columns."""
        if _dense_products.get():
            return FrozenLinear(self.dense(), transposed=False).matmul(x, bias)
        return int8.linear(x, self.codes, self.scale, bias, threshold=self.threshold)

    def matmul_t(self, g: Tensor, into: Tensor | None = None) -> Tensor:
        """[n, out] -> [n, in]: g W; with ``into`` [n, in], added to that in place."""
        return int8.linear_t(g, self.codes, self.scale, into=into)


class Linear8bit(QuantLinear):
    """y = W x + b with W in int8, row by row. Further arguments as in ``QuantLinear``.

    Args:
        threshold: activations from here on are outliers, whose columns are computed in floating point; 0 for none.
    """

    def __init__(self, in_features: int, out_features: int, *, threshold: float = 6.0, **layer: Any) -> None:
        super().__init__(in_features, out_features, **layer)
        self.threshold = threshold
        self._scale = torch.empty(0)  # float32 [out]

    def _frozen(self) -> FrozenLinear8bit:
        return FrozenLinear8bit(self.weight.detach(), self._scale, self.threshold, self.dtype)

    @property
    def nbytes_by_parameter(self) -> Mapping[str, int]:
        """See ``Packed``."""
        return {"weight": self.out_features * (self.in_features + 4)}

    def packed(self) -> dict[str, Tensor]:
        """``weight``, ``SCB`` and ``weight_format`` (0: by rows)."""
        return {"weight": self.weight.detach(), "SCB": self._scale, "weight_format": torch.tensor(0, dtype=torch.uint8)}

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """See ``QuantLinear.fill``."""
        codes, scale = tensors.get("weight"), tensors.get("SCB")
        name, form = self.path or "weight", tensors.get("weight_format")
        if codes is None or scale is None or codes.dtype != torch.int8:
            found = ", ".join(sorted(tensors))
            raise QuantizationError(f"{name}: not a whole int8 weight", ("found", found), ("expected", "weight, SCB"))
        if form is not None and int(form) != 0:
            raise QuantizationError(f"{name}: an int8 weight in the layout {int(form)}", ("expected", "0, by rows"))
        if codes.shape != (self.out_features, self.in_features) or scale.numel() != self.out_features:
            raise QuantizationError(
                f"{name}: {list(codes.shape)} with {scale.numel()} scales",
                ("expected", f"{[self.out_features, self.in_features]} with {self.out_features}"),
            )
        self._keep(codes, scale.float().view(-1))

    def _pack(self, dense: Tensor) -> None:
        self._keep(*int8.quantize_rows(dense))

    def _keep(self, codes: Tensor, scale: Tensor) -> None:
        self.weight = nn.Parameter(codes, requires_grad=False)
        self._scale = scale

    def _move(self, device: torch.device) -> None:
        self._scale = self._scale.to(device)
