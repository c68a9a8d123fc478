"""Embedding tables in 4 and 8 bits: only the rows that are looked up are made dense."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn
from typing_extensions import Self

from truetune.errors import QuantizationError
from truetune.ops import int8
from truetune.ops.blockwise_4bit import Packed4, dequantize_4bit, quantize_4bit
from truetune.ops.codebooks import Kind4


class QuantEmbedding(nn.Module, ABC):
    """What the packed tables share: ``weight`` holds codes, buffers hold float32 scales, and nothing is trained."""

    weight: nn.Parameter

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = table.shape
        self.dtype = table.dtype

    def forward(self, ids: Tensor) -> Tensor:
        """[...] int64 -> [..., dim]."""
        return self._rows(ids.reshape(-1)).view(*ids.shape, self.embedding_dim)

    @abstractmethod
    def _rows(self, ids: Tensor) -> Tensor:
        """[n] int64 -> [n, dim]."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantEmbedding:
        """Scales are float32 whatever a model is cast to: only where they are may change."""
        scales = dict(self.named_buffers())
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, scale in scales.items():
            self.register_buffer(name, scale.to(self.weight.device))
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device)).dtype
        return self


class Embedding4bit(QuantEmbedding):
    """A frozen table [vocab, dim] in NF4 or FP4; ``dim`` is a multiple of the block size, so that blocks are rows' own.

    Args:
        table: dense, any floating dtype; not changed. Rows come out in its dtype.
        kind, blocksize: as in ``Linear4bit``.
    Raises:
        QuantizationError: a width that blocks don't divide, or values that are not finite.
    """

    absmax: Tensor

    def __init__(self, table: Tensor, *, kind: Kind4 = "nf4", blocksize: int = 64) -> None:
        super().__init__(table)
        if self.embedding_dim % blocksize:
            raise QuantizationError(
                f"a table of width {self.embedding_dim} in blocks of {blocksize}: a block would span two rows",
                ("way out", "a block size that divides the width, or Embedding8bit"),
            )
        self.kind: Kind4 = kind
        self.blocksize = blocksize
        packed = quantize_4bit(table.detach(), kind, blocksize=blocksize)
        assert packed.absmax is not None
        self.weight = nn.Parameter(packed.codes.view(self.num_embeddings, -1), requires_grad=False)
        self.register_buffer("absmax", packed.absmax.view(self.num_embeddings, -1))

    @classmethod
    def from_base(cls, base: nn.Embedding, *, kind: Kind4 = "nf4", blocksize: int = 64) -> Self:
        """Quantise a table; it is not changed. Raises QuantizationError if it does more than look up rows."""
        return cls(_plain_table(base), kind=kind, blocksize=blocksize)

    def _rows(self, ids: Tensor) -> Tensor:
        codes, absmax = self.weight[ids].view(-1), self.absmax[ids].view(-1)
        shape = (len(ids), self.embedding_dim)
        return dequantize_4bit(Packed4(codes, absmax, None, self.kind, self.blocksize, shape, self.dtype))


class Embedding8bit(QuantEmbedding):
    """A frozen table [vocab, dim] in int8, row by row (as ``Linear8bit`` stores its weight)."""

    SCB: Tensor

    def __init__(self, table: Tensor) -> None:
        super().__init__(table)
        codes, scale = int8.quantize_rows(table.detach())
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("SCB", scale)

    @classmethod
    def from_base(cls, base: nn.Embedding) -> Self:
        """Quantise a table; it is not changed. Raises QuantizationError if it does more than look up rows."""
        return cls(_plain_table(base))

    def _rows(self, ids: Tensor) -> Tensor:
        return int8.dequantize_rows(self.weight[ids], self.SCB[ids], dtype=self.dtype)


def _plain_table(base: nn.Embedding) -> Tensor:
    if type(base) is not nn.Embedding or base.max_norm is not None:
        raise QuantizationError(f"{type(base).__name__}: a table that does more than look up rows is not packed")
    return base.weight
