"""What PEFT's prompt methods write of the model's shape into ``adapter_config.json``."""

from __future__ import annotations

from typing import Any

from torch import nn

# Read from the model itself: a file that names another shape does not fit it by its tensors.
SHAPE_FIELDS = ("token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers")


def shape_fields(model: nn.Module, count: int, *, width: int | None = None, heads: int | None = None) -> dict[str, Any]:
    """The fields that PEFT fills in from the model.

    Args:
        count: virtual tokens.
        width: of one of them (default: of an embedding).
        heads: that share it (default: of the attention).
    """
    config: Any = model.config
    text = config.get_text_config()
    return {
        "num_virtual_tokens": count,
        "token_dim": text.hidden_size if width is None else width,
        "num_transformer_submodules": 1,
        "num_attention_heads": text.num_attention_heads if heads is None else heads,
        "num_layers": text.num_hidden_layers,
    }
