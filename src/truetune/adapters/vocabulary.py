"""New tokens: the ids they take, and the rows that an embedding table and a head grow by for them.

Rows that a checkpoint holds beyond its tokens are taken first. What has to be added starts at the mean of the rows that
tokens had before: a new token is then about as likely as an average one, and changes no answer by itself (Hewitt 2021,
"Initializing New Word Embeddings for Pretrained Language Models").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from truetune.adapters.base import Adapter
from truetune.adapters.targets import output_head
from truetune.errors import AdapterError

KEY = "tokenizer"
"""Where ``truetune.json`` tells of them."""


@dataclass(frozen=True)
class NewTokens:
    """Tokens that a base's tokenizer did not have.

    Attributes:
        ids: token → id.
        known: how many tokens there were.
        before, after: rows of the embedding table.
    """

    ids: Mapping[str, int]
    known: int
    before: int
    after: int

    def card(self) -> dict[str, Any]:
        """As ``truetune.json`` holds it."""
        return {"added": dict(self.ids), "tokens": self.known, "vocabulary": [self.before, self.after]}

    @classmethod
    def of_card(cls, card: Mapping[str, Any]) -> NewTokens | None:
        """What a ``truetune.json`` tells; None for nothing."""
        found = card.get(KEY)
        if not found:
            return None
        ids = dict(sorted(found["added"].items(), key=lambda item: item[1]))  # the order they were added in
        return cls(ids, found["tokens"], *found["vocabulary"])


def new_tokens(model: nn.Module) -> NewTokens | None:
    """Those that were added to this model."""
    return cast("NewTokens | None", getattr(model, "truetune_new_tokens", None))


def admit(model: nn.Module, new: NewTokens) -> None:
    """Let a model know new tokens: its table and head grow where they are too small.

    Raises:
        AdapterError: the table or the head is packed, or there is no table.
    """
    resize(model, max(new.after, rows_of_table(model)), known=new.known)
    model.truetune_new_tokens = new  # type: ignore[assignment]


def dismiss(model: nn.Module, rows: int) -> None:
    """Give table and head the rows they had, and forget the tokens."""
    resize(model, rows)
    if new_tokens(model):
        del model.truetune_new_tokens


def rows_of_table(model: nn.Module) -> int:
    """Rows of the embedding table."""
    return len(_weight(_table(model)))


def resize(model: nn.Module, rows: int, *, known: int | None = None) -> None:
    """Give the table and the head so many rows; one matrix stays one, and the first rows stay what they are.

    Args:
        known: new rows are the mean of the first so many; of all by default.
    Raises:
        AdapterError: as ``admit``.
    """
    table, head, before = _table(model), output_head(model), rows_of_table(model)
    if rows == before:
        return
    tied = head is not None and head.weight is table.weight
    plain = [m for m in (table, head) if isinstance(m, nn.Embedding | nn.Linear)]
    if len(plain) < 1 + (head is not None):
        kind = " and ".join(type(m).__name__ for m in (table, head) if m is not None and m not in plain)
        raise AdapterError(
            f"new tokens: this model's vocabulary ends at {before - 1}, and its {kind} can't be made larger",
            ("way out", "a base whose embedding table and head are dense"),
        )
    for module in plain:
        for name, parameter in list(module.named_parameters(recurse=False)):
            new = resized(parameter.detach(), rows, known=known)
            setattr(module, name, Parameter(new, requires_grad=parameter.requires_grad))
        setattr(module, "num_embeddings" if isinstance(module, nn.Embedding) else "out_features", rows)
    if tied:
        cast(nn.Module, head).weight = table.weight
    _tell(model, before, rows)


def resized(tensor: Tensor, rows: int, *, known: int | None = None) -> Tensor:
    """[n, …] -> [rows, …] in its dtype: cut, or with the mean of the first ``known`` in every new row."""
    if rows <= len(tensor):
        return tensor[:rows].clone()
    mean = tensor[:known].mean(dim=0, keepdim=True, dtype=torch.float32).to(tensor.dtype)
    return torch.cat([tensor, mean.expand(rows - len(tensor), *tensor.shape[1:])])


def _tell(model: nn.Module, before: int, rows: int) -> None:
    """Config and modules name the size of the vocabulary as well."""
    config: Any = getattr(model, "config", None)
    own = [config, config.get_text_config()] if config is not None and hasattr(config, "get_text_config") else [config]
    for holder in (*own, *model.modules()):
        if isinstance(size := getattr(holder, "vocab_size", None), int) and size == before:
            holder.vocab_size = rows


def _table(model: nn.Module) -> nn.Module:
    get = getattr(model, "get_input_embeddings", None)
    table = get() if get else None
    if not isinstance(table, nn.Module):
        raise AdapterError("the model has no table of input embeddings, so it can't take a new token")
    while isinstance(table, Adapter):
        table = table.base
    return table


def _weight(table: nn.Module) -> Tensor:
    return cast(Tensor, table.weight)
