"""Architectures as llama.cpp has them: what a GGUF calls one, its hyperparameters, and how its weights are laid out.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. What an architecture's code there takes for granted (an
activation, a scale) is checked here: a model that differs would load, and answer nonsense.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from truetune.errors import ModelError
from truetune.export.gguf_rope import KINDS, head_width, rope_keys

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
        ropes: kinds of rotary positions that its code computes.
        partial_rope: whether it rotates a part of a head.
        own_width: whether a head may be of another width than the model's divided by its heads.
        biases: whether attention may have biases that a config asks for.
        own_head: whether the head may be another table than that of the embeddings.
        windowed: whether it computes sliding windows.
        extra: hyperparameters beside those that most have.
    """

    name: str
    activations: tuple[str, ...] = ("silu",)
    rotates_halves: bool = True
    norm_plus_one: bool = False
    conv1d: bool = False
    ropes: tuple[str, ...] = ("default", "linear", "yarn")
    partial_rope: bool = False
    own_width: bool = True
    biases: bool = False
    own_head: bool = True
    windowed: bool = False
    extra: Callable[[Any], dict[str, Value]] = lambda config: {}


def _gemma2(config: Any) -> dict[str, Value]:
    # The largest one has a scale of its own, and llama.cpp knows it by its layers.
    scale = config.hidden_size // config.num_attention_heads if config.num_hidden_layers == 46 else config.head_dim
    alternating = [("sliding_attention", "full_attention")[n % 2] for n in range(config.num_hidden_layers)]
    for what, granted, found in (
        ("scales queries by", scale, config.query_pre_attn_scalar),
        ("slides the window of every other layer:", alternating, list(config.layer_types)),
        (
            "caps logits:",
            True,
            config.attn_logit_softcapping is not None and config.final_logit_softcapping is not None,
        ),
    ):
        if found != granted:
            raise _otherwise("Gemma 2", what, granted, found)
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
_LLAMA = Arch("llama", rotates_halves=False, biases=True, ropes=KINDS)
ARCHS: Mapping[str, Arch] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": Arch("qwen2", own_width=False),
    "Qwen3ForCausalLM": Arch("qwen3"),
    "GemmaForCausalLM": Arch("gemma", _GELU, norm_plus_one=True, own_head=False),
    "Gemma2ForCausalLM": Arch("gemma2", _GELU, norm_plus_one=True, own_head=False, windowed=True, extra=_gemma2),
    "Phi3ForCausalLM": Arch("phi3", partial_rope=True, own_width=False, extra=_phi3),
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
        raise _otherwise(name, "activates by", arch.activations[0], activation)
    _check_details(name, arch, config)
    return arch


def _check_details(name: str, arch: Arch, config: Any) -> None:
    """What a config may say of an architecture, and llama.cpp's code for it passes over."""
    if arch.name == "gpt2":
        scaled = bool(config.scale_attn_weights), bool(config.scale_attn_by_inverse_layer_idx)
        if scaled != (True, False):
            raise _otherwise(name, "scales attention by its width alone:", (True, False), scaled)
        return
    usual = config.hidden_size // config.num_attention_heads
    if not arch.own_width and head_width(config) != usual:
        raise _otherwise(name, "gives each head a width of", usual, head_width(config))
    if not arch.biases and getattr(config, "attention_bias", False):
        raise _otherwise(name, "adds biases in attention:", False, True)
    if not arch.own_head and not config.tie_word_embeddings:
        raise _otherwise(name, "takes the table of embeddings for the head:", True, False)
    hyperparameters(arch, config, 0)  # rotary positions, caps and scales


def _otherwise(name: str, what: str, granted: Any, found: Any) -> ModelError:
    return ModelError(
        f"llama.cpp computes {name} otherwise than this model's config says",
        ("llama.cpp", f"{what} {granted}"),
        ("the model", str(found)),
        ("way out", "--to hf: transformers computes it as it is"),
    )


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
    found: dict[str, Value] = {
        "context_length": min(config.max_position_embeddings, window_left_out(arch, config) or math.inf),
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads or config.num_attention_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": width,
        "attention.value_length": width,
        "vocab_size": rows,
    }
    return found | rope_keys(config, kinds=arch.ropes, partial=arch.partial_rope) | arch.extra(config)


def window_left_out(arch: Arch, config: Any) -> int | None:
    """The sliding window that a model has and llama.cpp does not compute for it; None where texts come out the same.

    Up to its length every token is attended to all the same, so that is as long as a text may be.
    """
    window = getattr(config, "sliding_window", None)
    layers = getattr(config, "layer_types", None)
    if arch.windowed or not window or (layers is not None and "sliding_attention" not in layers):
        return None
    return int(window) if window < config.max_position_embeddings else None
