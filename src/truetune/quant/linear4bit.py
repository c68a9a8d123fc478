"""A linear layer whose weight is 4-bit codes with one scale per block (QLoRA, Dettmers et al. 2023, arXiv:2305.14314).

Each product makes the weight dense in one buffer that all layers share, so nothing dense outlives it: the forward and
the backward see the same numbers, whatever was evaluated in between.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from truetune.errors import QuantizationError
from truetune.ops import buffers
from truetune.ops.blockwise_4bit import Nested, Packed4, dequantize_4bit, quantize_4bit
from truetune.ops.codebooks import Kind4
from truetune.ops.frozen import FrozenLinear
from truetune.quant import bnb_state
from truetune.quant.base import QuantLinear


@dataclass(frozen=True)
class FrozenLinear4bit:
    """The seam's view of 4-bit codes."""

    packed: Packed4
    dtype: torch.dtype

    @property
    def out_features(self) -> int:
        """Rows of W."""
        return self.packed.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of W."""
        return self.packed.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.packed.codes.device

    def dense(self) -> Tensor:
        """[out, in], in memory that the next call on any layer writes over."""
        out = buffers.scratch(self.out_features, self.in_features, self.dtype, self.device)
        return dequantize_4bit(self.packed, dtype=self.dtype, out=out)

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[n, in] -> [n, out]: x Wᵀ + bias."""
        return FrozenLinear(self.dense(), transposed=False).matmul(x, bias)

    def matmul_t(self, g: Tensor, into: Tensor | None = None) -> Tensor:
        """[n, out] -> [n, in]: g W; with ``into`` [n, in], added to that in place."""
        return FrozenLinear(self.dense(), transposed=False).matmul_t(g, into)


class Linear4bit(QuantLinear):
    """y = W x + b with W in NF4 or FP4. Further arguments as in ``QuantLinear``.

    Args:
        kind: ``nf4`` or ``fp4``.
        blocksize: values per scale, a power of two from 32 to 4096.
        double: the scales are quantised too.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        kind: Kind4 = "nf4",
        blocksize: int = 64,
        double: bool = False,
        **layer: Any,
    ) -> None:
        super().__init__(in_features, out_features, **layer)
        self.kind: Kind4 = kind
        self.blocksize, self.is_double = blocksize, double
        self._packed: Packed4 | None = None

    def packed4(self) -> Packed4:
        """The weight as the kernels take it."""
        assert self._packed is not None, f"{self.path or 'the layer'} has no weight yet"
        return self._packed

    def _frozen(self) -> FrozenLinear4bit:
        return FrozenLinear4bit(self.packed4(), self.dtype)

    def packed(self) -> dict[str, Tensor]:
        """As ``bnb_state.of_packed4`` names them."""
        return {f"weight{name}": tensor for name, tensor in bnb_state.of_packed4(self.packed4()).items()}

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """See ``QuantLinear.fill``."""
        found = bnb_state.packed4_of({name.removeprefix("weight"): t for name, t in tensors.items()}, self.path)
        if found.shape != (self.out_features, self.in_features):
            raise QuantizationError(
                f"{self.path or 'weight'}: the packed weight is {list(found.shape)}",
                ("expected", str([self.out_features, self.in_features])),
            )
        self._keep(found)

    def _pack(self, dense: Tensor) -> None:
        self._keep(quantize_4bit(dense, self.kind, blocksize=self.blocksize, double=self.is_double))

    def _keep(self, packed: Packed4) -> None:
        self.kind, self.blocksize, self.is_double = packed.kind, packed.blocksize, packed.nested is not None
        self._packed = packed
        self.weight = nn.Parameter(packed.codes.view(-1, 1), requires_grad=False)

    def _move(self, device: torch.device) -> None:
        nested, absmax = self.packed4().nested, self.packed4().absmax
        nested = nested and Nested(nested.codes.to(device), nested.absmax.to(device), nested.offset.to(device))
        absmax = None if absmax is None else absmax.to(device)
        codes = self.weight.detach().view(-1)
        self._packed = replace(self.packed4(), codes=codes, absmax=absmax, nested=nested)

    @property
    def nbytes_by_parameter(self) -> Mapping[str, int]:
        """See ``Packed``."""
        shape = (self.out_features, self.in_features)
        planned = bnb_state.planned4(self.kind, shape, blocksize=self.blocksize, double=self.is_double)
        return {"weight": sum(values * part_dtype.itemsize for part_dtype, values in planned.values())}

    def extra_repr(self) -> str:
        """Sizes and form, for ``print(model)``."""
        return f"{super().extra_repr()}, kind={self.kind}{', double' if self.is_double else ''}"
