"""A model's layers as its files tell them (``models.by_files``): modules with names and shapes.

Asking transformers for them imports its model code, which takes more processor time than folding an adapter into a
model of a billion weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from truetune.checkpoint.header import TensorEntry
from truetune.models.by_files import TABLE, PlainConfig, is_matrix


class Outline(nn.Module):
    """Modules with shapes and no weights, on the meta device, under the paths that transformers gives them."""

    base_model_prefix = "model"

    def __init__(self, config: PlainConfig) -> None:
        super().__init__()
        self.config = config

    def get_input_embeddings(self) -> nn.Module:
        """The embedding table."""
        return self.get_submodule("model.embed_tokens")

    def get_output_embeddings(self) -> nn.Module:
        """The head, whose weight is the table's where they are tied."""
        return self.get_submodule("lm_head")


def outline(config: PlainConfig, entries: Mapping[str, TensorEntry]) -> Outline:
    """The modules, in the dtype of the config."""
    model = Outline(config)
    for name, entry in entries.items():
        path, _, kind = name.rpartition(".")
        if kind == "weight":
            _place(model, path, _module(entry, path, bias=f"{path}.bias" in entries, dtype=config.dtype))
    if config.tied:
        rows, width = entries[TABLE].shape
        head, table = (
            nn.Linear(width, rows, bias=False, device="meta", dtype=config.dtype),
            model.get_input_embeddings(),
        )
        assert isinstance(table, nn.Embedding)
        head.weight = table.weight
        model.lm_head = head
    return model


def _module(entry: TensorEntry, path: str, *, bias: bool, dtype: torch.dtype) -> nn.Module:
    if not is_matrix(entry.name):
        norm = nn.Module()
        norm.weight = nn.Parameter(torch.empty(entry.shape, device="meta", dtype=dtype))
        return norm
    out, size = entry.shape
    if entry.name == TABLE:
        # Given its weight, it draws none: on this device that would import a compiler.
        return nn.Embedding(out, size, _weight=torch.empty(out, size, device="meta", dtype=dtype))
    return nn.Linear(size, out, bias=bias, device="meta", dtype=dtype)


def _place(model: nn.Module, path: str, module: nn.Module) -> None:
    *parents, last = path.split(".")
    for part in parents:
        if not hasattr(model, part):
            model.add_module(part, nn.Module())
        model = model.get_submodule(part)
    model.add_module(last, module)
