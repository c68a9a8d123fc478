"""Packing and adapters ask for linear layers only: encoders, speech, vision, and both together train alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Blip2Config,
    Blip2ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from packed import KINDS, dense_twin, packed_layers, values
from reference.norms import distance
from truetune.adapters.inject import adapters, attach, detach
from truetune.config.lora import LoRA
from truetune.quant.replace import replace

_SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
_IDS = torch.tensor([[1, 5, 9, 3, 2], [4, 4, 8, 7, 2]])
_IMAGES = {"image_size": 16, "patch_size": 8}
Problem = tuple[nn.Module, Mapping[str, Tensor]]


def bert() -> Problem:
    config = BertConfig(
        vocab_size=40, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **_SMALL
    )
    return BertForSequenceClassification(config), {"input_ids": _IDS, "labels": torch.tensor([0, 2])}


def vit() -> Problem:
    config = ViTConfig(num_labels=3, **_IMAGES, **_SMALL)
    return ViTForImageClassification(config), {"pixel_values": values(2, 3, 16, 16), "labels": torch.tensor([0, 2])}


def whisper() -> Problem:
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = WhisperConfig(
        vocab_size=40, d_model=32, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=10,
        max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, **layers,
    )  # fmt: skip
    return WhisperForConditionalGeneration(config), {"input_features": values(2, 8, 20), "labels": _IDS}


def blip2() -> Problem:
    text = {"model_type": "opt", "vocab_size": 40, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 1,
            "num_attention_heads": 4, "word_embed_proj_dim": 32, "max_position_embeddings": 32, "dropout": 0.0,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    looks = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "encoder_hidden_size": 32}
    config = Blip2Config(
        vision_config=_SMALL | _IMAGES, qformer_config=_SMALL | looks | {"vocab_size": 40}, text_config=text,
        num_query_tokens=2, image_token_index=39,
    )  # fmt: skip
    ids = torch.cat([torch.full((2, 2), 39), _IDS], dim=1)
    labels = ids.masked_fill(ids == 39, -100)
    return Blip2ForConditionalGeneration(config), {
        "input_ids": ids, "pixel_values": values(2, 3, 16, 16), "labels": labels
    }  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [bert, vit, whisper, blip2])
def test_a_packed_model_learns(make: Callable[[], Problem], kind: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, batch = make()
        with torch.no_grad():
            for parameter in model.parameters():  # some start at zero, and so would the gradients behind them
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.train()
    assert replace(model, KINDS[kind], dtype=torch.float32) == len(packed_layers(model)) >= 6
    packed = packed_layers(model)
    frozen = {path: layer.weight.clone() for path, layer in packed.items()}
    before = model(**batch).loss
    twin = dense_twin(model)(**batch).loss.detach()
    assert distance(before.detach(), twin) < (2e-2 if kind == "int8" else 1e-6)
    attach(model, LoRA(rank=4, alpha=8))
    assert float(model(**batch).loss.detach()) == pytest.approx(float(before.detach()), rel=1e-6)
    wrapped = dict(adapters(model))
    assert frozen.keys() <= wrapped.keys()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    for _ in range(3):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(model(**batch).loss.detach()) < float(before.detach())
    silent = [name for name, p in trained.items() if p.grad is None]
    assert not silent
    assert [name for name, p in trained.items() if p.grad is not None and not p.grad.any()] == []
    assert all(torch.equal(layer.weight, frozen[path]) for path, layer in packed.items())
    detach(model)
    assert float(model(**batch).loss.detach()) == pytest.approx(float(before.detach()), rel=1e-6)
