"""Chosen rows of the embedding table, and of the head, trained beside an adapter: PEFT's ``trainable_token_indices``.

Only these rows exist as parameters, have gradients and are stored; the matrix stays frozen, dense or packed. The file
holds the rows themselves, not what was added to them. Where the head is the table, it reads the same rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn import functional as F

from truetune.adapters.base import Adapter, Change
from truetune.adapters.targets import matches, output_head, shortest_names
from truetune.adapters.virtual import table_path
from truetune.adapters.vocabulary import NewTokens, new_tokens
from truetune.errors import AdapterError
from truetune.ops.frozen import frozen_weight, is_linear

ROWS = "token_adapter.trainable_tokens_delta"
BASE_COPY = "token_adapter.base_layer.weight"
"""PEFT stores the whole matrix as well where the vocabulary grew."""

FIELD = "trainable_token_indices"


class _Rows(Adapter):
    """What the table's rows and the head's share.

    Args:
        base: the frozen matrix's layer.
        ids: distinct, each below the number of its rows.
        start: [n, dim]; None where another layer owns the rows.
    """

    files = {"rows": ROWS}  # noqa: RUF012 - ClassVar in the contract

    def __init__(self, base: nn.Module, ids: Sequence[int], start: Tensor | None) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.ids: Tensor
        self.register_buffer("ids", torch.tensor(ids, dtype=torch.int64), persistent=False)
        self.rows = None if start is None else Parameter(start.detach().float().clone())

    def adapter_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """The rows, where they are its own."""
        yield from () if self.rows is None else ((ROWS, self.rows),)

    def changes(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Change]:
        """The rows in the place of the base's."""
        if self.rows is None:
            return {}
        ids, rows = self.ids.cpu(), tensors[ROWS]
        return {"weight": lambda weight: weight.index_copy(0, ids.to(weight.device), rows.to(weight))}

    def trained(self) -> Tensor:
        """[n, dim] float32."""
        assert self.rows is not None
        return self.rows

    def merged_weight(self) -> Tensor:
        """[vocab, dim], with the rows in their places."""
        weight = dense_matrix(self.base)
        return weight.index_copy(0, self.ids.to(weight.device), self.trained().detach().to(weight))


class TokenRows(_Rows):
    """An embedding table of which some rows are trained."""

    def __init__(self, base: nn.Module, ids: Sequence[int], start: Tensor) -> None:
        super().__init__(base, ids, start)
        order = torch.tensor(sorted(range(len(ids)), key=ids.__getitem__), dtype=torch.int64)
        self.order: Tensor
        self.register_buffer("order", order, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[...] int64 -> [..., dim], in the dtype of the table."""
        rows: Tensor = self.base(x)
        flat, known = x.flatten(), self.ids[self.order]
        place = torch.searchsorted(known, flat).clamp(max=len(known) - 1)
        positions = (known[place] == flat).nonzero()[:, 0]
        own = F.embedding(self.order[place[positions]], self.trained())
        # Gemma 3 multiplies its rows by sqrt(dim) inside the table's module.
        scale = getattr(innermost(self.base), "embed_scale", None)
        own = own.to(rows.dtype) if scale is None else own.to(rows.dtype) * torch.as_tensor(scale).to(rows.dtype)
        return rows.flatten(0, -2).index_copy(0, positions, own).view_as(rows)


class HeadRows(_Rows):
    """An output head of which some rows are trained: its own, or those of the table that is the same matrix."""

    def __init__(
        self, base: nn.Module, ids: Sequence[int], start: Tensor | None, table: TokenRows | None = None
    ) -> None:
        super().__init__(base, ids, start)
        self._table = (table,)  # in a tuple: a module attribute would register the rows a second time

    def trained(self) -> Tensor:
        """[n, dim] float32, whoever owns them."""
        table = self._table[0]
        return super().trained() if table is None else table.trained()

    def shared_parameters(self) -> Iterator[Parameter]:
        """The table's rows."""
        table = self._table[0]
        if table is not None and table.rows is not None:
            yield table.rows

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., vocab]."""
        y: Tensor = self.base(x)
        bias = None if self.bias is None else self.bias[self.ids].to(x.dtype)
        own = F.linear(x, self.trained().to(x.dtype), bias)
        return y.index_copy(-1, self.ids, own.to(y.dtype))


def innermost(layer: nn.Module) -> nn.Module:
    """The base's own layer under every adapter."""
    while isinstance(layer, Adapter):
        layer = layer.base
    return layer


def dense_matrix(layer: nn.Module) -> Tensor:
    """[vocab, dim] of a table or a head, frozen; of a packed one a dense copy."""
    layer = innermost(layer)
    if is_linear(layer):
        return frozen_weight(layer).dense().detach()
    if isinstance(layer, nn.Embedding):
        return layer.weight.detach()
    everything = torch.arange(int(layer.num_embeddings), device=torch.as_tensor(layer.weight).device)  # type: ignore[arg-type]
    return torch.as_tensor(layer(everything)).detach()


def rows_for(model: nn.Module, ids: Sequence[int], tied: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Path → ids: of the table, and of a head that is a matrix of its own.

    Args:
        tied: paths of (table, head) where they are one.
    """
    if not ids:
        return {}
    table, head = table_path(model), output_head(model)
    paths = [table, *(path for path, module in model.named_modules() if module is head and not tied)]
    return dict.fromkeys(paths, tuple(dict.fromkeys(ids)))


def saved_rows(model: nn.Module, field: Any, tied: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Path → ids by PEFT's field: a list is of the table, a mapping names layers.

    Raises:
        AdapterError: a name that the model has no matrix for.
    """
    if not field:
        return {}
    if not isinstance(field, Mapping):
        return {table_path(model): tuple(dict.fromkeys(field))}
    found: dict[str, tuple[int, ...]] = {}
    for name, ids in field.items():
        paths = [path for path, _ in model.named_modules() if matches(name, path)]
        if len(paths) != 1:
            raise AdapterError(f"{FIELD}: the model has {len(paths)} layers called '{name}'", ("expected", "one"))
        found[paths[0]] = tuple(dict.fromkeys(ids))
    if len(set(tied) & set(found)) > 1 and found[tied[0]] == found[tied[1]]:
        del found[tied[1]]
    return found


def check_rows(model: nn.Module, rows: Mapping[str, Sequence[int]], taken: Sequence[str]) -> None:
    """That these rows are there, and nothing else changes their matrix.

    Args:
        taken: paths of layers that are adapted as a matrix, or trained as a whole.
    Raises:
        AdapterError: naming what is not.
    """
    for path, ids in rows.items():
        layer = innermost(model.get_submodule(path))
        if not (isinstance(layer, nn.Embedding) or is_linear(layer) or hasattr(layer, "num_embeddings")):
            raise AdapterError(f"{FIELD}: {path} is a {type(layer).__name__}, which has no row for a token")
        count = layer.num_embeddings if hasattr(layer, "num_embeddings") else frozen_weight(layer).out_features
        if beyond := [i for i in ids if not 0 <= i < int(count)]:  # type: ignore[arg-type]
            raise AdapterError(f"--token-rows {beyond[0]}: {path} has rows 0 to {int(count) - 1}")  # type: ignore[arg-type]
    if both := sorted(set(rows) & set(taken)):
        raise AdapterError(
            f"{', '.join(both)}: rows of single tokens would be trained, and the whole matrix is adapted or trained",
            ("way out", "leave it out of --targets and --trainable, or leave out --new-tokens and --token-rows"),
        )


def put_rows(model: nn.Module, rows: Mapping[str, Sequence[int]], tied: Sequence[str]) -> tuple[str, ...]:
    """Wrap the layers whose rows are trained; returns (table, head) where the head follows the table."""
    new, follows = new_tokens(model), bool(tied) and tied[0] in rows and tied[1] not in rows
    for path, ids in rows.items():
        layer = model.get_submodule(path)
        kind = HeadRows if is_linear(innermost(layer)) else TokenRows
        _replace(model, path, kind(layer, ids, _start(layer, ids, new)))
    if follows:
        table, head = model.get_submodule(tied[0]), model.get_submodule(tied[1])
        assert isinstance(table, TokenRows)
        _replace(model, tied[1], HeadRows(head, rows[tied[0]], None, table))
    return tuple(tied) if follows else ()


def _start(layer: nn.Module, ids: Sequence[int], new: NewTokens | None) -> Tensor:
    """[n, dim]: the rows as they are; of new tokens the mean of those that were there before."""
    weight = dense_matrix(layer)
    rows = weight[torch.tensor(ids, dtype=torch.int64, device=weight.device)].float()
    fresh = [place for place, i in enumerate(ids) if new and i in new.ids.values()]
    if fresh and new:
        rows[fresh] = weight[: new.known].mean(dim=0, dtype=torch.float32)
    return rows


def to_peft(model: nn.Module, rows: Mapping[str, Sequence[int]]) -> Any:
    """PEFT's field: a list where the table alone is named, else a mapping."""
    if list(rows) == [table_path(model)]:
        return list(*rows.values())
    return {shortest_names(model, [path])[0]: list(ids) for path, ids in rows.items()}


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
