"""Several adapters of one kind at the same layer, each reading what the frozen layer alone reads and makes.

    y = f(x) + Σ w_i g_i(x, f(x))

g_i is what a bottleneck, or a LLaMA-Adapter's attention to its prompts, adds to its layer's result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

from torch import Tensor, nn

from truetune.adapters.base import Adapter
from truetune.errors import AdapterError


class Adding(Protocol):
    """An adapter that adds to what its layer makes, and reads nothing that another one of its kind changes."""

    base: nn.Module

    def observed(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """``(what the frozen layer makes, what ``added`` reads)``."""

    def added(self, seen: Any) -> Tensor:
        """What it adds to the first of that."""


class Summed(Adapter):
    """Adapters of one frozen layer, each times its weight.

    Args:
        members: of one class, on the same layer.
        weights: one of each.
    """

    files = {}  # noqa: RUF012 - ClassVar in the contract

    def __init__(self, members: Sequence[Adapter], weights: Sequence[float]) -> None:
        super().__init__()
        self.base = members[0].base
        self.members, self.weights = nn.ModuleList(members), tuple(weights)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the base's."""
        adding = [cast(Adding, member) for member in self.members]
        made, seen = adding[0].observed(*args, **kwargs)
        total = sum(one.added(seen) * weight for one, weight in zip(adding, self.weights, strict=True))
        return plus(made, cast(Tensor, total))

    def merged_weight(self) -> Tensor:
        """Raises AdapterError: none of them folds into a weight."""
        raise AdapterError("adapters of this kind do not fold into weights: serve them beside the base")


def plus(made: Any, added: Tensor) -> Any:
    """A layer's result, of which the first part gets something more, in its own dtype."""
    if isinstance(made, tuple):
        return (made[0] + added.to(made[0].dtype), *made[1:])
    return made + added.to(made.dtype)
