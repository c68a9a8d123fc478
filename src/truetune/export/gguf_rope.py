"""Rotary positions as llama.cpp has them: its keys, its table of factors, and the order of the rows that are rotated.

What it computes is what transformers computes (``modeling_rope_utils``) where it can be told to; the rest is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from truetune.errors import ModelError

KINDS = ("default", "linear", "llama3", "yarn")
_WAY_OUT = ("way out", "--to hf: transformers computes it as it is")


def rope_of(config: Any) -> Mapping[str, Any]:
    """What the config says of rotary positions, ``rope_type`` among it."""
    found: dict[str, Any] = dict(
        getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    )
    for name in ("rope_theta", "partial_rotary_factor"):
        if found.get(name) is None and getattr(config, name, None) is not None:
            found[name] = getattr(config, name)
    found["rope_type"] = found.get("rope_type") or found.get("type") or "default"
    return found


def head_width(config: Any) -> int:
    """Values per attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rope_keys(config: Any, *, kinds: tuple[str, ...], partial: bool) -> dict[str, Any]:
    """The keys under an architecture's ``rope``.

    Args:
        kinds: that its code computes, of ``KINDS``.
        partial: whether it rotates a part of a head where it is told to.
    Raises:
        ModelError: anything else.
    """
    rope, width = rope_of(config), head_width(config)
    share = float(rope.get("partial_rotary_factor") or 1.0)
    if share != 1.0 and not partial:
        raise ModelError(
            f"llama.cpp rotates whole heads of this architecture, and this model {share:.0%} of each", _WAY_OUT
        )
    if rope["rope_type"] not in kinds:
        raise ModelError(
            f"rotary positions of kind '{rope['rope_type']}' can't be written as a GGUF of this architecture",
            ("known", ", ".join(kinds)), _WAY_OUT,
        )  # fmt: skip
    found = {"rope.freq_base": float(rope.get("rope_theta") or 10000.0), "rope.dimension_count": int(width * share)}
    return found | _scaling(rope, config)


def _scaling(rope: Mapping[str, Any], config: Any) -> dict[str, Any]:
    match rope["rope_type"]:
        case "linear":
            return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
        case "yarn":
            return _yarn(rope, config)
    return {}  # the factors of llama3 are a tensor


def _yarn(rope: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """YaRN (arXiv 2309.00071) as every architecture of llama.cpp takes it: ramps from 32 to 1 turns, cut to whole ones.

    It multiplies queries and keys by 0.1 ln(factor) + 1; another factor is told by its quotient to that.
    """
    fast, slow = rope.get("beta_fast") or 32, rope.get("beta_slow") or 1
    if (fast, slow) != (32, 1) or rope.get("truncate") is False:
        raise ModelError(
            f"llama.cpp computes YaRN with beta_fast 32, beta_slow 1 and truncate, and this model has {fast}, {slow}, "
            f"{rope.get('truncate', True)}",
            _WAY_OUT,
        )
    original = int(rope.get("original_max_position_embeddings") or config.max_position_embeddings)
    factor = float(rope.get("factor") or config.max_position_embeddings / original)
    found = {
        "rope.scaling.type": "yarn", "rope.scaling.factor": factor, "rope.scaling.original_context_length": original,
    }  # fmt: skip
    wanted = _attention_factor(rope, factor)
    own = _stretch(factor, 1.0)
    return found if math.isclose(wanted, own) else found | {"rope.scaling.attn_factor": wanted / own}


def _attention_factor(rope: Mapping[str, Any], factor: float) -> float:
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return _stretch(factor, float(rope["mscale"])) / _stretch(factor, float(rope["mscale_all_dim"]))
    return _stretch(factor, 1.0)


def _stretch(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def rope_factors(config: Any) -> Tensor | None:
    """What llama.cpp divides each frequency by, [head_dim / 2] in float32; None where it is 1 everywhere.

    Llama 3.1's rule: long waves are stretched by ``factor``, short ones stay, and those between are blended.
    """
    rope = rope_of(config)
    if (rope.get("rope_type") or rope.get("type")) != "llama3":
        return None
    width, factor = head_width(config), float(rope["factor"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    exponents = torch.arange(0, width, 2, dtype=torch.float64) / width
    waves = 2 * math.pi * float(rope.get("rope_theta") or 10000.0) ** exponents
    turns = float(rope["original_max_position_embeddings"]) / waves
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - blend) / factor + blend)).to(torch.float32)


def side_by_side(rows: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys with the two values of each rotary pair next to each other.

    Args:
        rows: [heads * width, …], in transformers' order: all first values of a head, then all second ones.
    """
    pairs = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)


def halves_apart(rows: Tensor, heads: int) -> Tensor:
    """The other way round: from pairs next to each other to transformers' order."""
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)
