"""Where an attention computes its queries, keys and values: three maps, or one whose outputs hold all of them.

Llama and whatever is built like it have ``q_proj``, ``k_proj`` and ``v_proj``. GPT-2 has one map with three blocks,
BLOOM and GPT-NeoX one with the three side by side for each head, GPT-BigCode one with a single head of keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from truetune.errors import AdapterError
from truetune.ops.frozen import frozen_weight, is_linear

_SEPARATE = ("q_proj", "k_proj", "v_proj")
_FUSED = {"gpt2": "c_attn", "gpt_bigcode": "c_attn", "bloom": "query_key_value", "gpt_neox": "query_key_value"}
_OUTPUTS = ("o_proj", "out_proj", "c_proj", "dense")


@dataclass(frozen=True)
class Part:
    """A linear map by its path, and which of its outputs are meant: [width] int64, or None for all."""

    path: str
    columns: Tensor | None = None


@dataclass(frozen=True)
class AttentionLayout:
    """One layer's attention; ``output`` is the path of the map that ends it."""

    path: str
    head_dim: int
    heads: int
    kv_heads: int
    query: Part
    key: Part
    value: Part
    output: str

    @property
    def kv_width(self) -> int:
        """Entries of one token's keys, of all heads."""
        return self.kv_heads * self.head_dim


def attention_layouts(model: nn.Module, method: str) -> list[AttentionLayout]:
    """Every attention of a model, in its order.

    Args:
        method: what asks, for the message.
    Raises:
        AdapterError: it has none that is known.
    """
    config: Any = model.config
    fused = _FUSED.get(config.model_type)
    found = [
        _fused(model, path, fused) if fused else _separate(model, path)
        for path, module in model.named_modules()
        if _has_maps(module, (fused,) if fused else _SEPARATE)
    ]
    if not found:
        raise AdapterError(
            f"--method {method}: the attention of {config.model_type} models is not built in a way that is known here",
            ("way out", "a model built like Llama, GPT-2, GPT-BigCode, GPT-NeoX or BLOOM; or --method lora"),
        )
    return found


def _has_maps(module: nn.Module, names: tuple[str, ...]) -> bool:
    children = dict(module.named_children())
    return all(name in children and is_linear(children[name]) for name in names)


def _shape(model: nn.Module, path: str) -> tuple[int, int]:
    """``(heads, entries of each)``."""
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    heads = int(config.num_attention_heads)
    own = getattr(model.get_submodule(path), "head_dim", None)
    return heads, own if isinstance(own, int) else int(config.hidden_size) // heads


def _layout(model: nn.Module, path: str, kv_heads: int, parts: tuple[Part, Part, Part]) -> AttentionLayout:
    heads, head_dim = _shape(model, path)
    attention = model.get_submodule(path)
    output = next((name for name in _OUTPUTS if hasattr(attention, name)), "")
    return AttentionLayout(path, head_dim, heads, kv_heads, *parts, f"{path}.{output}")


def _separate(model: nn.Module, path: str) -> AttentionLayout:
    query, key, value = (Part(f"{path}.{name}") for name in _SEPARATE)
    width = frozen_weight(model.get_submodule(key.path)).out_features
    return _layout(model, path, width // _shape(model, path)[1], (query, key, value))


def _fused(model: nn.Module, path: str, name: str) -> AttentionLayout:
    heads, head_dim = _shape(model, path)
    kind, hidden = model.config.model_type, heads * head_dim  # type: ignore[union-attr]
    width = frozen_weight(model.get_submodule(f"{path}.{name}")).out_features
    numbers = torch.arange(width)
    if width == hidden + 2 * head_dim and heads > 1:
        blocks = [numbers[:hidden], numbers[hidden:-head_dim], numbers[-head_dim:]]
    elif kind == "gpt2":
        blocks = list(numbers.view(3, hidden))
    else:
        blocks = [part.flatten() for part in numbers.view(heads, 3, head_dim).unbind(1)]
    query, key, value = (Part(f"{path}.{name}", block) for block in blocks)
    return _layout(model, path, len(blocks[1]) // head_dim, (query, key, value))
