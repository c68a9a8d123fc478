"""Architectures as llama.cpp has them: what a GGUF calls one, its hyperparameters, and how its weights are laid out.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. What an architecture's code there takes for granted (an
activation, a scale) is checked here: a model that differs would load, and answer nonsense.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from truetune.errors import ModelError

Value = bool | int | float | str | list[Any]


@dataclass(frozen=True)
class Arch:
    """One architecture of llama.cpp.

    Attributes:
        name: as in ``general.architecture``, and the first part of its keys.
        activations: that its code computes, by transformers' names.
        rotates_halves: whether rotary pairs lie apart by half a head, as in transformers; llama.cpp's ``llama`` has
            them side by side, so that rows of queries and keys are put in another order.
        norm_plus_one: norms are stored as the difference from one, and llama.cpp wants them whole.
        conv1d: linear layers are stored as [in, out].
        extra: hyperparameters beside those that most have.
    """

    name: str
    activations: tuple[str, ...] = ("silu",)
    rotates_halves: bool = True
    norm_plus_one: bool = False
    conv1d: bool = False
    extra: Callable[[Any], dict[str, Value]] = lambda config: {}


def _gemma2(config: Any) -> dict[str, Value]:
    if config.query_pre_attn_scalar != config.head_dim:
        raise ModelError(
            f"llama.cpp scales this model's queries by its head's width {config.head_dim}, and its config says "
            f"{config.query_pre_attn_scalar}"
        )
    return {
        "attn_logit_softcapping": float(config.attn_logit_softcapping),
        "final_logit_softcapping": float(config.final_logit_softcapping),
        "attention.sliding_window": int(config.sliding_window),
    }


def _phi3(config: Any) -> dict[str, Value]:
    found: dict[str, Value] = {
        "rope.scaling.original_context_length": int(
            getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings
        )
    }
    return found | ({"attention.sliding_window": int(config.sliding_window)} if config.sliding_window else {})


_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
ARCHS: Mapping[str, Arch] = {
    "LlamaForCausalLM": Arch("llama", rotates_halves=False),
    "MistralForCausalLM": Arch("llama", rotates_halves=False),
    "Qwen2ForCausalLM": Arch("qwen2"),
    "Qwen3ForCausalLM": Arch("qwen3"),
    "GemmaForCausalLM": Arch("gemma", (*_GELU, "gelu"), norm_plus_one=True),
    "Gemma2ForCausalLM": Arch("gemma2", _GELU, norm_plus_one=True, extra=_gemma2),
    "Phi3ForCausalLM": Arch("phi3", extra=_phi3),
    "GPT2LMHeadModel": Arch("gpt2", _GELU, conv1d=True),
}
"""By transformers' name of the class."""


def arch_of(config: Any) -> Arch:
    """The architecture of a model.

    Raises:
        ModelError: none that is known here, or a detail that llama.cpp computes otherwise.
    """
    name = (getattr(config, "architectures", None) or ["a model without an architecture"])[0]
    if name not in ARCHS:
        raise ModelError(
            f"{name} can't be written as a GGUF by this version",
            ("known", ", ".join(ARCHS)),
            ("way out", "--to hf, and a converter that knows it"),
        )
    arch = ARCHS[name]
    activation = _first(config, "hidden_activation", "hidden_act", "activation_function")
    if activation not in arch.activations:
        raise ModelError(
            f"llama.cpp computes {name} with {arch.activations[0]}, and this model has {activation}",
            ("way out", "--to hf: transformers computes it as it is"),
        )
    return arch


def _first(config: Any, *names: str) -> Any:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def hyperparameters(arch: Arch, config: Any, rows: int) -> dict[str, Value]:
    """The keys of ``arch.name`` without it, such as ``block_count``.

    Args:
        rows: of the embedding table.
    """
    if arch.name == "gpt2":
        return {
            "context_length": config.n_positions,
            "embedding_length": config.n_embd,
            "feed_forward_length": config.n_inner or 4 * config.n_embd,
            "block_count": config.n_layer,
            "attention.head_count": config.n_head,
            "attention.layer_norm_epsilon": float(config.layer_norm_epsilon),
        }
    width = head_width(config)
    rope = rope_of(config)
    partial = float(rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0)
    found: dict[str, Value] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads or config.num_attention_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": width,
        "attention.value_length": width,
        "rope.freq_base": float(rope.get("rope_theta") or 10000.0),
        "rope.dimension_count": int(width * partial),
        "vocab_size": rows,
    }
    return found | _rope_scaling(rope) | arch.extra(config)


def head_width(config: Any) -> int:
    """Values per attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rope_of(config: Any) -> Mapping[str, Any]:
    """What the config says of rotary positions, ``rope_type`` among it."""
    found: dict[str, Any] = dict(
        getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    )
    if found.get("rope_theta") is None and getattr(config, "rope_theta", None) is not None:
        found["rope_theta"] = config.rope_theta
    return found


def _rope_scaling(rope: Mapping[str, Any]) -> dict[str, Value]:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    match kind:
        case "default" | "llama3":  # the latter's factors are a tensor
            return {}
        case "linear":
            return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
        case "yarn":
            return {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": float(rope["factor"]),
                "rope.scaling.original_context_length": int(rope["original_max_position_embeddings"]),
            }
    raise ModelError(
        f"rotary positions of kind '{kind}' can't be written as a GGUF by this version",
        ("known", "default, linear, llama3, yarn"),
        ("way out", "--to hf"),
    )


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
