"""A model's layers by its files alone: names and shapes tell them all, where the family is known to be built plainly.

Asking transformers for them imports its model code, which takes more processor time than folding an adapter into a
model of a billion weights. Whatever is not certain here is left to ``load.load_config`` and ``load.skeleton``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from truetune.checkpoint.header import TensorEntry

TIED: Mapping[str, bool] = {
    "gemma": True, "gemma2": True, "llama": False, "mistral": False, "olmo2": False, "phi3": False, "qwen2": False,
    "qwen3": False,
}  # fmt: skip
"""``model_type`` of the families that keep their weights as ``nn.Linear`` and one ``nn.Embedding``, under the names in
their files; and whether the head is the table where ``config.json`` does not say."""

_TABLE, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_NAMES = re.compile(r"lm_head\.weight|model\.(embed_tokens|norm|layers\.(\d+)(\.\w+)+)\.(weight|bias)")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class PlainConfig:
    """What a merge asks of a config.

    Attributes:
        dtype: of the checkpoint, by its config.
        tied: the head is the embedding table.
    """

    model_type: str
    dtype: torch.dtype
    tied: bool
    vocab_size: int

    def get_text_config(self) -> PlainConfig:
        """Itself: these families have no other parts."""
        return self


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


def plain_config(folder: Path, entries: Mapping[str, TensorEntry]) -> PlainConfig | None:
    """What the files say of a model whose layers they tell; None where only transformers can.

    Args:
        folder: with ``config.json``.
        entries: every tensor of its weights.
    """
    try:
        raw = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(raw, dict) or raw.get("model_type") not in TIED or {"quantization_config", "auto_map"} & set(raw):
        return None
    tied = raw.get("tie_word_embeddings", TIED[raw["model_type"]])
    dtype = _DTYPES.get(str(raw.get("dtype", raw.get("torch_dtype"))).removeprefix("torch."))
    if not isinstance(tied, bool) or dtype is None or not _tells_all(entries, raw.get("num_hidden_layers")):
        return None
    if tied is (_HEAD in entries) or entries[_TABLE].shape[0] != raw.get("vocab_size"):
        return None
    return PlainConfig(raw["model_type"], dtype, tied, raw["vocab_size"])


def outline(config: PlainConfig, entries: Mapping[str, TensorEntry]) -> Outline:
    """The modules, in the dtype of the config."""
    model = Outline(config)
    for name, entry in entries.items():
        path, _, kind = name.rpartition(".")
        if kind == "weight":
            _place(model, path, _module(entry, path, bias=f"{path}.bias" in entries, dtype=config.dtype))
    if config.tied:
        rows, width = entries[_TABLE].shape
        head, table = (
            nn.Linear(width, rows, bias=False, device="meta", dtype=config.dtype),
            model.get_input_embeddings(),
        )
        assert isinstance(table, nn.Embedding)
        head.weight = table.weight
        model.lm_head = head
    return model


def _tells_all(entries: Mapping[str, TensorEntry], layers: object) -> bool:
    found = [_NAMES.fullmatch(name) for name in entries]
    if not all(found) or _TABLE not in entries:
        return False
    if any(len(entry.shape) != (2 if _is_matrix(name) else 1) for name, entry in entries.items()):
        return False
    return len({match[2] for match in found if match and match[2]}) == layers


def _is_matrix(name: str) -> bool:
    return name.endswith(("_proj.weight", _TABLE, _HEAD))


def _module(entry: TensorEntry, path: str, *, bias: bool, dtype: torch.dtype) -> nn.Module:
    if not _is_matrix(entry.name):
        norm = nn.Module()
        norm.weight = nn.Parameter(torch.empty(entry.shape, device="meta", dtype=dtype))
        return norm
    out, size = entry.shape
    if entry.name == _TABLE:
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
