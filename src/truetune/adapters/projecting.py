"""Linear maps as one node of the graph: which adapted layers, and which bare ones, can be parts of one together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

from torch import Tensor, nn

from truetune.adapters.base import Adapter
from truetune.ops.frozen import frozen_weight, has_plain_products
from truetune.ops.projection import Group, Projection
from truetune.ops.rng import current_keys


class Projecting(Protocol):
    """An adapter that can be part of a node."""

    dropout: float
    training: bool
    site: int
    drops_base: bool

    def projection(self) -> Projection | None:
        """It, or None where it can't."""


def projection_group(modules: Sequence[nn.Module], tokens: int) -> Group | None:
    """Linear maps of one input as one node of the graph; None where one of them is trained itself, or of another kind.

    Args:
        modules: frozen linear layers, adapted or not.
        tokens: rows of the input, for the dropout masks.
    """
    projections = [projection_of(module) for module in modules]
    adapted = [cast(Projecting, module) for module in modules if _projects(module)]
    if not all(projections) or len({(m.dropout, m.training, m.drops_base) for m in adapted}) > 1:
        return None
    found = tuple(p for p in projections if p is not None)
    if not (adapted and adapted[0].dropout and adapted[0].training):
        return Group(found)
    first = adapted[0]
    keys = current_keys(tokens, found[0].weight.device)
    return Group(found, first.dropout, keys, first.site, first.drops_base)


def _projects(module: nn.Module) -> bool:
    return isinstance(module, Adapter) and hasattr(module, "projection")


def projection_of(module: nn.Module) -> Projection | None:
    """A layer as part of a node, adapted or not; None where it is trained itself, or of another kind."""
    if _projects(module):
        return cast(Projecting, module).projection()
    if not has_plain_products(module) or any(p.requires_grad for p in module.parameters()):
        return None
    return Projection(frozen_weight(module), module.bias if isinstance(module.bias, Tensor) else None)
