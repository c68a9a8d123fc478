"""A map that makes keys or values, whose outputs at virtual tokens are trained rows (see ``adapters.prefix``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from truetune.adapters.base import Adapter
from truetune.adapters.projecting import projection_group
from truetune.adapters.virtual import places_in_force
from truetune.errors import AdapterError
from truetune.ops.projection import Projection


@dataclass(frozen=True)
class Slot:
    """Which of a prefix's rows, and where they go: [width] int64 columns of the map's output, or None for all."""

    number: int
    columns: Tensor | None


class PrefixLinear(Adapter):
    """A frozen linear layer with rows of a prefix in the virtual tokens' places; the table owns them."""

    files = {}  # noqa: RUF012 - ClassVar in the contract
    dropout, site, drops_base = 0.0, 0, False  # as ``adapters.projecting.Projecting`` asks for

    def __init__(self, base: nn.Module, slots: Sequence[Slot]) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.slots = tuple(slots)

    def projection(self) -> Projection | None:
        """The base's alone: ``with_rows`` has to follow."""
        group = projection_group((self.base,), tokens=1)
        return None if group is None else group.projections[0]

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in the dtype of the base's output."""
        return self.with_rows(self.base(x))

    def with_rows(self, y: Tensor) -> Tensor:
        """The map's output [..., out] with the prefix in its places."""
        places = places_in_force()
        if places is None:
            return y
        flat = y.flatten(0, -2)
        if len(flat) != places.tokens:
            raise AdapterError(
                f"a prefix for {places.tokens} tokens, and {len(flat)} are computed",
                ("way out", "call the model with input_ids: the prefix goes by them"),
            )
        own = flat[places.positions]
        for slot in self.slots:
            rows = F.embedding(places.numbers, places.rows[slot.number]).to(y.dtype)
            own = rows if slot.columns is None else own.index_copy(1, slot.columns.to(y.device), rows)
        return flat.index_copy(0, places.positions, own).view_as(y)

    def merged_weight(self) -> Tensor:
        """Raises AdapterError: what it puts out at a virtual token is in no weight."""
        raise AdapterError("a prefix does not fold into the base's weights: serve it beside the base")


def with_prefix(module: nn.Module, y: Tensor) -> Tensor:
    """What a map puts out, with a prefix in its places where the map has one."""
    return module.with_rows(y) if isinstance(module, PrefixLinear) else y
