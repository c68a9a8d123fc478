"""An embedding that trains stably with 8-bit optimizers (Dettmers et al. 2022, arXiv:2110.02861, section 2.3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from truetune.optim.override import override_32bit


class StableEmbedding(nn.Embedding):
    """``nn.Embedding`` with three changes: Xavier-uniform weights, a layer norm behind the lookup, state in 32 bits.

    Rows of rare tokens have gradients far larger than the others of their step; the three keep these from dominating
    what a block of 8-bit state can represent. Parameters are ``weight`` [num_embeddings, embedding_dim] and those of
    ``norm``, as in bitsandbytes' layer of this name, so checkpoints fit both.

    Args:
        *args, **kwargs: those of ``nn.Embedding``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # In float32, or whatever the default is: the norm of a half-precision embedding keeps its precision.
        self.norm = nn.LayerNorm(self.embedding_dim, device=self.weight.device)
        override_32bit(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy, or one that was pickled, keeps its 32 bits."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        override_32bit(self)

    def reset_parameters(self) -> None:
        """Xavier-uniform (Glorot & Bengio 2010); the padding row is zero."""
        nn.init.xavier_uniform_(self.weight)
        if self.padding_idx is not None:
            with torch.no_grad():
                self.weight[self.padding_idx].fill_(0)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """[...] int64 -> [..., embedding_dim], in the dtype of ``weight``; normed in that of ``norm``."""
        normed: Tensor = self.norm(super().forward(input).to(self.norm.weight.dtype))
        return normed.to(self.weight.dtype)
