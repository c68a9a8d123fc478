"""What a model is by its files alone: read without torch and without transformers, which take seconds to import.

Names and shapes tell the layers where the family is known to be built plainly; whatever is not certain here is left to
``load.load_config`` and ``load.skeleton``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from truetune.checkpoint.header import TensorEntry, dtype_of

if TYPE_CHECKING:
    import torch

TIED: Mapping[str, bool] = {
    "gemma": True, "gemma2": True, "llama": False, "mistral": False, "olmo2": False, "phi3": False, "qwen2": False,
    "qwen3": False,
}  # fmt: skip
"""``model_type`` of the families that keep their weights as ``nn.Linear`` and one ``nn.Embedding``, under the names in
their files; and whether the head is the table where ``config.json`` does not say."""

TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_NAMES = re.compile(r"lm_head\.weight|model\.(embed_tokens|norm|layers\.(\d+)(\.\w+)+)\.(weight|bias)")
_CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass
class PlainConfig:
    """What a merge asks of a config.

    Attributes:
        code: the dtype of the checkpoint by its config, as a header calls it.
        tied: the head is the embedding table.
    """

    model_type: str
    code: str
    tied: bool
    vocab_size: int

    @property
    def dtype(self) -> torch.dtype:
        """As torch calls it."""
        return dtype_of(self.code)

    def get_text_config(self) -> PlainConfig:
        """Itself: these families have no other parts."""
        return self


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
    if (
        not isinstance(raw, dict)
        or str(raw.get("model_type")) not in TIED
        or {"quantization_config", "auto_map"} & set(raw)
    ):
        return None
    tied = raw.get("tie_word_embeddings", TIED[raw["model_type"]])
    code = _CODES.get(str(raw.get("dtype", raw.get("torch_dtype"))).removeprefix("torch."))
    if not isinstance(tied, bool) or code is None or not _tells_all(entries, raw.get("num_hidden_layers")):
        return None
    if tied is (HEAD in entries) or entries[TABLE].shape[0] != raw.get("vocab_size"):
        return None
    return PlainConfig(raw["model_type"], code, tied, raw["vocab_size"])


def _tells_all(entries: Mapping[str, TensorEntry], layers: object) -> bool:
    found = [_NAMES.fullmatch(name) for name in entries]
    if not all(found) or TABLE not in entries:
        return False
    if any(len(entry.shape) != (2 if is_matrix(name) else 1) for name, entry in entries.items()):
        return False
    return len({match[2] for match in found if match and match[2]}) == layers


def is_matrix(name: str) -> bool:
    """Whether a tensor of such a model is a linear layer's weight, or the table."""
    return name.endswith(("_proj.weight", TABLE, HEAD))
