"""Numbers of trained parameters by the formula, on models of published shapes that hold no weights."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from truetune.adapters.inject import attach, trainable
from truetune.config.lora import DoRA, LoRA
from truetune.models import load


def skeleton(kind: str, **shape: int) -> nn.Module:
    return load.skeleton(getattr(transformers, kind)(**shape), dtype=torch.bfloat16)


LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
STARCODER = {"n_embd": 6144, "n_layer": 40, "n_head": 48, "n_inner": 24576, "n_positions": 8192, "vocab_size": 49152}
BLOOMZ_3B = {"hidden_size": 2560, "n_layer": 30, "n_head": 32, "vocab_size": 250880}


def low_rank(rank: int, *maps: tuple[int, int]) -> int:
    """r (in + out) for each."""
    return sum(rank * (inner + out) for inner, out in maps)


def test_llama_7b_on_queries_and_values() -> None:
    """The number that Alpaca-LoRA's runs print."""
    model = skeleton("LlamaConfig", **LLAMA_7B)
    attach(model, LoRA(rank=8, targets=("q_proj", "v_proj")))
    assert sum(trainable(model).values()) == 4_194_304 == 32 * 2 * low_rank(8, (4096, 4096))


def test_starcoder_on_its_attention_and_projections() -> None:
    """One key and value for all heads; ``c_proj`` is in the attention and in the MLP."""
    model = skeleton("GPTBigCodeConfig", **STARCODER)
    attach(model, LoRA(rank=16, targets=("c_attn", "c_proj")))
    per_layer = low_rank(16, (6144, 6144 + 2 * 128), (6144, 6144), (24576, 6144))
    assert sum(trainable(model).values()) == 40 * per_layer == 35_553_280


def test_bloomz_3b_on_queries_keys_and_values() -> None:
    model = skeleton("BloomConfig", **BLOOMZ_3B)
    attach(model, LoRA(rank=16, targets=("query_key_value",)))
    assert sum(trainable(model).values()) == 30 * low_rank(16, (2560, 3 * 2560)) == 4_915_200


def test_loralib_on_queries_and_values_of_gpt2_medium() -> None:
    """An A for each part, and no B for the keys."""
    model = skeleton("GPT2Config", n_embd=1024, n_layer=24, n_head=16)
    attach(model, LoRA(rank=4, targets=("c_attn",), slices=("qkv=q,v",)))
    assert sum(trainable(model).values()) == 24 * 2 * low_rank(4, (1024, 1024)) == 393_216


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("all-linear",)])
def test_dora_adds_one_for_every_output(targets: tuple[str, ...]) -> None:
    counts = []
    for settings in (LoRA(rank=8, targets=targets), DoRA(rank=8, targets=targets)):
        model = skeleton("LlamaConfig", **LLAMA_7B)
        attach(model, settings)
        counts.append(sum(trainable(model).values()))
    outputs = 2 * 4096 if targets[0] == "q_proj" else 5 * 4096 + 2 * 11008
    assert counts[1] - counts[0] == 32 * outputs
