"""Low-rank adaptation of an embedding table, and of the output head that shares it.

The table is W [vocab, dim]; its update is s (B A)ᵀ with A [r, vocab] zero and B [dim, r] random at the start, as in
loralib and PEFT. Where the model's head is tied to the table, the head takes the very same update, so that what was one
matrix stays one matrix through training, saving and merging.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from truetune.adapters.base import Adapter
from truetune.adapters.lora import LoRAParams
from truetune.config.lora import LoRA
from truetune.ops import lowrank


def merge_table(weight: Tensor, params: LoRAParams) -> Tensor:
    """W + s (B A)ᵀ.

    Args:
        weight: [vocab, dim]. Not modified.
        params: a [r, vocab], b [dim, r].
    Returns:
        A new [vocab, dim] tensor in the dtype of ``weight``.
    """
    return lowrank.fold(weight, params.b.T, params.a.T, params.scale)


class LoRAEmbedding(Adapter):
    """A frozen ``nn.Embedding`` with a trained low-rank update. Arguments as in ``LoRALinear``, without dropout."""

    files = {"lora_a": "lora_embedding_A", "lora_b": "lora_embedding_B"}  # noqa: RUF012 - ClassVar in the contract

    def __init__(
        self,
        base: nn.Embedding,
        *,
        rank: int,
        alpha: float,
        rank_stabilised: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.base: nn.Embedding = base.requires_grad_(False)
        self.scale = lowrank.scale(alpha, rank, rank_stabilised=rank_stabilised)
        vocab, dim = base.weight.shape
        device = base.weight.device
        self.lora_a = nn.Parameter(torch.zeros(rank, vocab, device=device))
        self.lora_b = nn.Parameter(torch.randn(dim, rank, generator=generator).to(device))

    @classmethod
    def from_base(
        cls,
        base: nn.Embedding,
        config: LoRA | None = None,
        *,
        generator: torch.Generator | None = None,
        **settings: Any,
    ) -> Self:
        """Wrap a table by the settings of a run, or by keywords. ``dropout`` has no place here and is not read."""
        config = LoRA(**{**(config or LoRA()).model_dump(), **settings})
        return cls(base, rank=config.rank, alpha=config.alpha, rank_stabilised=config.use_rslora, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """[...] int64 -> [..., dim] in the dtype of the table."""
        rows: Tensor = self.base(x)
        # Gemma 3 multiplies its rows by sqrt(dim) inside the table's module: the update belongs inside as well.
        scale = self.scale * float(getattr(self.base, "embed_scale", 1.0))
        return rows + lowrank.lookup(x, self.lora_a, self.lora_b, scale, dtype=rows.dtype)

    def params(self) -> LoRAParams:
        """The trained tensors and their scale."""
        return LoRAParams(a=self.lora_a.detach(), b=self.lora_b.detach(), scale=self.scale)

    def merged_weight(self) -> Tensor:
        """W + s (B A)ᵀ, [vocab, dim]."""
        return merge_table(self.base.weight.detach(), self.params())


class TiedHead(Adapter):
    """The output head of a model whose head is its embedding table: it reads the table's adapter and owns nothing.

    In the file it appears as a LoRA of its own with A = Bᵀ and B = Aᵀ of the table's, as PEFT's
    ``ensure_weight_tying`` writes it: ``copies`` maps the head's suffixes to the table's.
    """

    files = {}  # noqa: RUF012 - ClassVar in the contract
    copies: ClassVar[Mapping[str, str]] = {"lora_A.weight": "lora_embedding_B", "lora_B.weight": "lora_embedding_A"}

    def __init__(self, base: nn.Linear, table: LoRAEmbedding) -> None:
        super().__init__()
        self.base: nn.Linear = base.requires_grad_(False)
        self._table = (table,)  # in a tuple: a module attribute would register the parameters a second time

    def shared_parameters(self) -> Iterator[nn.Parameter]:
        """The table's A and B."""
        yield from (self._table[0].lora_a, self._table[0].lora_b)

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., vocab]."""
        table = self._table[0]
        y: Tensor = F.linear(x, self.base.weight, self.base.bias)
        return y + lowrank.linear(x, table.lora_b.T, table.lora_a.T, table.scale).to(y.dtype)

    def merged_weight(self) -> Tensor:
        """The table's, [vocab, dim]."""
        return self._table[0].merged_weight()
