"""A frozen weight as adapters see it: its sizes, and its dense form [out, in], however it is stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn


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
