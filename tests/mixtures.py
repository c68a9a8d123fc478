"""Tiny mixtures of experts whose experts are one parameter each, written as published ones are: a tensor per expert."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GptOssConfig, MixtralConfig, PretrainedConfig, Qwen3MoeConfig

_SHAPE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16,
    "num_key_value_heads": 1, "num_experts_per_tok": 2, "max_position_embeddings": 256,
}  # fmt: skip
_PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
MIXTURES: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "mixtral": (MixtralConfig, {"num_local_experts": 4}),
    "qwen3-moe": (Qwen3MoeConfig, {"num_experts": 4, "moe_intermediate_size": 12}),
}
GPT_OSS = (GptOssConfig, {"num_local_experts": 4, "rope_parameters": _PLAIN_ROPE})  # transposed, with biases, stacked


def write_mixture(tiny_model: Path, folder: Path, kind: str) -> Path:
    """A folder with the tiny model's tokenizer and a random mixture of its vocabulary."""
    config, own = {**MIXTURES, "gpt-oss": GPT_OSS}[kind]
    tiny = AutoConfig.from_pretrained(tiny_model)
    shape = _SHAPE | own | {"vocab_size": tiny.vocab_size, "eos_token_id": tiny.eos_token_id, "pad_token_id": None}
    shutil.copytree(tiny_model, folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config(**(shape | {"bos_token_id": None}))).save_pretrained(folder)
    return folder
