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

from truetune.adapters.base import Adapter, Change, LowRankUpdate
from truetune.adapters.lora import LoRAParams
from truetune.adapters.lora_start import FROM_WEIGHTS
from truetune.adapters.standalone import Mergeable
from truetune.config.lora import LoRA
from truetune.errors import AdapterError
from truetune.ops import lowrank

A, B = "lora_embedding_A", "lora_embedding_B"


def merge_table(weight: Tensor, params: LoRAParams) -> Tensor:
    """W + s (B A)ᵀ.

    Args:
        weight: [vocab, dim]. Not modified.
        params: a [r, vocab], b [dim, r].
    Returns:
        A new [vocab, dim] tensor in the dtype of ``weight``.
    """
    return lowrank.fold(weight, params.b.T, params.a.T, params.scale)


class LoRAEmbedding(Mergeable):
    """A frozen ``nn.Embedding`` with a trained low-rank update. Arguments as in ``LoRALinear``, without dropout."""

    files = {"lora_a": A, "lora_b": B}  # noqa: RUF012 - ClassVar in the contract
    settings: ClassVar[type[LoRA]] = LoRA

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
        self.rank, self.alpha, self.rank_stabilised = rank, alpha, rank_stabilised
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
        """Wrap a table by the settings of a run, or by keywords. ``dropout`` has no place here and is not read.

        Raises:
            AdapterError: a bias beside B, or a start that looks at the base's weight.
        """
        config = cls.settings(**{**(config or cls.settings()).model_dump(), **settings})
        if config.lora_bias or config.init in FROM_WEIGHTS:
            flag = "--lora-bias" if config.lora_bias else f"--init {config.init}"
            raise AdapterError(
                f"{flag}: for linear layers, and an embedding table is none", ("way out", "leave it out of --targets")
            )
        return cls(base, rank=config.rank, alpha=config.alpha, rank_stabilised=config.use_rslora, generator=generator)

    @property
    def scale(self) -> float:
        """s."""
        return lowrank.scale(self.alpha, self.rank, rank_stabilised=self.rank_stabilised)

    def update(self, own: Mapping[str, Tensor] | None = None) -> LowRankUpdate | None:
        """A [r, vocab], B [dim, r] and their scale."""
        a, b = (self.lora_a, self.lora_b) if own is None else (own[A], own[B])
        return LowRankUpdate(a, b, self.scale, kind="embedding")

    def magnitude(self) -> Tensor | None:
        """[dim], what the rows are multiplied by; None for nothing."""
        return None

    def forward(self, x: Tensor) -> Tensor:
        """[...] int64 -> [..., dim] in the dtype of the table."""
        rows: Tensor = self.base(x)
        if self.is_merged:
            return rows
        # Gemma 3 multiplies its rows by sqrt(dim) inside the table's module: the update belongs inside as well.
        scale = self.scale * float(getattr(self.base, "embed_scale", 1.0))
        rows = rows + lowrank.lookup(x, self.lora_a, self.lora_b, scale, dtype=rows.dtype)
        magnitude = self.magnitude()
        return rows if magnitude is None else (rows * magnitude).to(rows.dtype)

    def changes(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Change]:
        """W + s (B A)ᵀ."""
        params = LoRAParams(a=tensors[A], b=tensors[B], scale=self.scale)
        return {"weight": lambda weight: self.folded(weight, params, tensors)}

    def folded(self, weight: Tensor, params: LoRAParams, own: Mapping[str, Tensor]) -> Tensor:
        """The merged table, [vocab, dim], rounded once; ``own`` are all tensors of the adapter."""
        return merge_table(weight, params)

    def params(self) -> LoRAParams:
        """The trained tensors and their scale."""
        return LoRAParams(a=self.lora_a.detach(), b=self.lora_b.detach(), scale=self.scale)

    def merged_weight(self) -> Tensor:
        """W + s (B A)ᵀ, [vocab, dim]."""
        weight = self.base.weight.detach()
        own = {suffix: tensor.detach() for suffix, tensor in self.own().items()}
        return weight.clone() if self.is_merged else self.folded(weight, self.params(), own)


class TiedHead(Adapter):
    """The output head of a model whose head is its embedding table: it reads the table's adapter and owns nothing.

    In the file it appears as a LoRA of its own with A = Bᵀ and B = Aᵀ of the table's, as PEFT's
    ``ensure_weight_tying`` writes it: ``copies`` maps the head's suffixes to the table's.
    """

    files = {}  # noqa: RUF012 - ClassVar in the contract
    copies: ClassVar[Mapping[str, str]] = {"lora_A.weight": B, "lora_B.weight": A}

    def __init__(self, base: nn.Linear, table: LoRAEmbedding) -> None:
        super().__init__()
        self.base: nn.Linear = base.requires_grad_(False)
        self._table = (table,)  # in a tuple: a module attribute would register the parameters a second time

    def shared_parameters(self) -> Iterator[nn.Parameter]:
        """The table's A and B."""
        yield from (self._table[0].lora_a, self._table[0].lora_b)

    def changes(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Change]:
        """Nothing of its own: the table's change is the head's."""
        return {}

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., vocab]."""
        table = self._table[0]
        y: Tensor = F.linear(x, self.base.weight, self.base.bias)
        if table.is_merged:  # what the two share was changed for both
            return y
        return y + lowrank.linear(x, table.lora_b.T, table.lora_a.T, table.scale).to(y.dtype)

    def merged_weight(self) -> Tensor:
        """The table's, [vocab, dim]."""
        return self._table[0].merged_weight()
