"""Tiny random models, one per family of architectures: every way a library's layers are named, stored and tied."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GPTBigCodeConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

VOCAB = 128
SHARED = Path(__file__).resolve().parents[2] / "shared"


@dataclass(frozen=True)
class Family:
    """How to make one, and the layers an adapter of it usually names."""

    config: Callable[..., PretrainedConfig]
    settings: dict[str, Any]
    targets: tuple[str, ...]
    table: str = "embed_tokens"
    head: str = "lm_head"

    def make(self, **changes: Any) -> PreTrainedModel:
        """The model with weights from a fixed seed, large enough that no part of it hides behind another."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = self.config(
                vocab_size=VOCAB, bos_token_id=1, eos_token_id=2, pad_token_id=None, **(self.settings | changes)
            )
            model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim > 1:
                        parameter.normal_(std=0.1)
                    else:
                        parameter.add_(torch.randn_like(parameter) * 0.1)
        return model.eval()


_ROPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
_GPT = {
    "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip
_DOWN = ("q_proj", "v_proj", "gate_proj", "down_proj")

FAMILIES: dict[str, Family] = {
    "llama": Family(LlamaConfig, _ROPE | {"tie_word_embeddings": False}, _DOWN),
    "llama-tied": Family(LlamaConfig, _ROPE | {"tie_word_embeddings": True}, _DOWN),
    "gpt2": Family(GPT2Config, _GPT, ("c_attn", "c_proj", "c_fc"), table="wte"),
    "bigcode": Family(GPTBigCodeConfig, _GPT, ("attn.c_attn", "attn.c_proj"), table="wte"),
    "bloom": Family(
        BloomConfig,
        {"hidden_size": 32, "n_layer": 2, "n_head": 4, "attention_dropout": 0.0, "hidden_dropout": 0.0},
        ("query_key_value", "dense_h_to_4h"),
        table="word_embeddings",
    ),
    "neox": Family(
        GPTNeoXConfig, _ROPE | {"use_parallel_residual": True}, ("query_key_value", "dense"), "embed_in"
    ),
    "opt": Family(
        OPTConfig,
        {
            "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "dropout": 0.0,
            "word_embed_proj_dim": 32, "max_position_embeddings": 64,
        },
        ("q_proj", "out_proj", "fc1"),
    ),
    "mistral": Family(MistralConfig, _ROPE | {"sliding_window": 4}, ("q_proj", "o_proj")),
    "qwen2": Family(Qwen2Config, _ROPE, ("q_proj", "k_proj", "up_proj")),
    "qwen3": Family(Qwen3Config, _ROPE | {"head_dim": 8}, ("q_proj", "v_proj", "o_proj")),
    "gemma": Family(GemmaConfig, _ROPE | {"head_dim": 8}, ("q_proj", "down_proj")),
    "gemma2": Family(Gemma2Config, _ROPE | {"head_dim": 8, "sliding_window": 4}, ("v_proj", "gate_proj")),
    "phi": Family(PhiConfig, _ROPE, ("q_proj", "dense", "fc1")),
}  # fmt: skip


def perturb(model: nn.Module, *, seed: int = 1) -> None:
    """Move everything that is trained away from where it starts, as training would."""
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=draws) * 0.1)


def token_rows(*, rows: int = 2, length: int = 12, seed: int = 2) -> Tensor:
    """[rows, length] random ids."""
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module, ids: Tensor | None = None) -> Tensor:
    """[rows, length, vocab] in ``eval`` mode."""
    with torch.no_grad():
        scores: Tensor = model.eval()(input_ids=token_rows() if ids is None else ids, use_cache=False).logits
    return scores


def distance(one: Tensor, other: Tensor) -> float:
    """Largest difference of any two entries, in units of the largest entry where that is above 1."""
    one, other = one.detach().float(), other.detach().float()
    return float((one - other).abs().max() / one.abs().max().clamp(min=1.0))
