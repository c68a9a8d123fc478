"""Virtual tokens: real positions in front of every text that no text has, for methods that train what stands there.

Their ids follow the vocabulary's: ``vocab + i`` for i = 0 … n - 1 (``virtual_ids``). The wrapped embedding table knows
them, so positions, packed segments, left padding, caches and recomputed layers treat them like any other token. As in
PEFT's prompt methods, they take positions 0 … n - 1 and the text follows.
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from truetune.adapters.base import Adapter
from truetune.errors import AdapterError

EMBEDDINGS = "prompt_embeddings"
"""The one key that PEFT's files of these methods hold."""


@dataclass(frozen=True)
class Places:
    """Where the virtual tokens stand among those that are being computed, and what they bring to each layer.

    Attributes:
        positions: [m] int64 into the flattened tokens.
        numbers: [m] int64, which virtual token it is.
        tokens: how many tokens are computed in all.
        rows: [n, width] each, by the slot that a layer asks for.
    """

    positions: Tensor
    numbers: Tensor
    tokens: int
    rows: tuple[Tensor, ...] = ()


# Layers are called by the model's own code, which hands the ids to none of them.
_places: ContextVar[Places | None] = ContextVar("virtual_places", default=None)


def places_in_force() -> Places | None:
    """Those of the batch that is being computed, for who computes a part of it a second time."""
    return _places.get()


@contextlib.contextmanager
def placed(places: Places | None) -> Iterator[None]:
    """Compute with these places."""
    token = _places.set(places)
    try:
        yield
    finally:
        _places.reset(token)


def publish(places: Places | None) -> None:
    """Tell the layers that are computed next: a table can't know where they end."""
    _places.set(places)


class VirtualTable(Adapter):
    """A frozen embedding table that knows ``count`` ids more than its own.

    Args:
        base: an ``nn.Embedding``, or a packed table.
    """

    whole_keys = True

    def __init__(self, base: nn.Module, count: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.count, self.num_embeddings = count, len(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[...] int64 -> [..., dim], in the dtype of the table."""
        is_virtual = x >= self.num_embeddings
        positions = is_virtual.flatten().nonzero()[:, 0]
        rows: Tensor = self.base(x.masked_fill(is_virtual, 0))
        if not len(positions):
            publish(None)
            return rows
        return self.put(rows, Places(positions, x.flatten()[positions] - self.num_embeddings, x.numel()))

    @abstractmethod
    def put(self, rows: Tensor, places: Places) -> Tensor:
        """The table's rows [..., dim], with what belongs in the virtual tokens' places."""

    def merged_weight(self) -> Tensor:
        """Raises AdapterError: positions are not in any weight."""
        raise AdapterError(f"{type(self).__name__} puts tokens in front of the text: that is in no weight")


class TrainedRows(VirtualTable):
    """A table whose virtual tokens have embeddings that are trained, or made of something trained."""

    @abstractmethod
    def embeddings(self) -> Tensor:
        """[n, dim] float32."""

    def put(self, rows: Tensor, places: Places) -> Tensor:
        """The embeddings, rounded to the table's dtype, in their places."""
        own = F.embedding(places.numbers, self.embeddings()).to(rows.dtype)
        return rows.flatten(0, -2).index_copy(0, places.positions, own).view_as(rows)


def table_path(model: nn.Module) -> str:
    """The path of the model's input embeddings.

    Raises:
        AdapterError: it has none.
    """
    get = getattr(model, "get_input_embeddings", None)
    table = get() if get else None
    paths: list[str] = [path for path, module in model.named_modules() if module is table]
    if not paths:
        raise AdapterError("the model has no table of input embeddings, so no token can be put in front of a text")
    return paths[0]


def virtual_ids(model: nn.Module) -> list[int]:
    """The ids to put in front of every text: none where the model's adapter has no virtual tokens."""
    table = next((m for m in model.modules() if isinstance(m, VirtualTable)), None)
    return [] if table is None else list(range(table.num_embeddings, table.num_embeddings + table.count))


def width_of(table: nn.Module) -> int:
    """Entries of one embedding, packed table or not."""
    width = getattr(table, "embedding_dim", None)
    return width if isinstance(width, int) else int(torch.as_tensor(table.weight).shape[1])
