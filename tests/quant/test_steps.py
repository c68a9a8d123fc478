"""A training step beside packed weights: by every way there is, as through the dense weights that they stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from fused_models import FUSABLE, by_definition, farthest, made, same_bits, state_of, step
from packed import KINDS, dense_twin, packed_layers
from truetune.adapters.inject import adapters, attach
from truetune.config.lora import LoRA
from truetune.models.survey import survey
from truetune.quant.linear8bit import unrounded
from truetune.quant.replace import replace

FAMILIES = ("llama", "qwen3", "gpt2")
CLOSE = 2e-5  # only the order of sums differs
ROUNDED = 0.1  # int8 rounds activations too, and the dense twin does not


def adapted(name: str, kind: str, *, dtype: torch.dtype = torch.float32, tied: bool = False, **lora: Any) -> Any:
    """Packed, with adapters that are away from where they start."""
    model = made(name, dtype=dtype, tie_word_embeddings=tied)
    replace(model, KINDS[kind], dtype=dtype)
    attach(model, LoRA(rank=4, alpha=8, **lora))
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "lora_" in path:
                parameter.copy_((0.3 if "lora_a" in path else 0.1) * torch.randn(parameter.shape, generator=draw))
    return model


@pytest.mark.parametrize("kind", ["nf4-double", "int8"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_is_the_one_through_the_dense_weights(name: str, kind: str) -> None:
    model = adapted(name, kind)
    expected = by_definition(dense_twin(model))
    assert len(survey(model).fusable) == (2 if name in FUSABLE else 0)
    ways: list[dict[str, Any]] = [
        {},
        {"fused": False},
        {"packing": False},
        {"recompute": "full", "micro_tokens": 64},
    ]
    for way in ways:
        with unrounded():
            assert farthest(step(model, **way), expected) < CLOSE, way
        assert kind != "int8" or CLOSE < farthest(step(model, **way), expected) < ROUNDED, way


@pytest.mark.parametrize("kind", KINDS)
def test_packed_and_padded_rows_give_one_step(kind: str) -> None:
    """In int8 a row's outliers decide which columns of its neighbours are rounded, so only nearly."""
    model = adapted("llama", kind)
    assert farthest(step(model), step(model, packing=False)) < (ROUNDED if kind == "int8" else CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_steps_are_near_the_dense_ones(kind: str) -> None:
    model = adapted("llama", kind, dtype=torch.bfloat16)
    twin = dense_twin(model)
    exact = by_definition(dense_twin(model))
    error = max(farthest(step(twin), exact), farthest(step(twin, fused=False), exact))
    assert farthest(step(model), exact) < 1.5 * error + (ROUNDED if kind == "int8" else 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_answering_between_steps_changes_no_bit_of_them(kind: str) -> None:
    model: PreTrainedModel = adapted("llama", kind, dropout=0.3)
    before, modes = step(model), state_of(model)
    held = {path: [t.clone() for t in layer.packed().values()] for path, layer in packed_layers(model).items()}
    model.eval()
    with torch.no_grad():
        ids = model.generate(torch.tensor([[5, 3, 2]]), max_new_tokens=4, do_sample=False, pad_token_id=0)
        model(input_ids=ids.repeat(3, 1))
    model.state_dict()
    assert same_bits(before, step(model.train()))
    assert modes == state_of(model)
    for path, layer in packed_layers(model).items():
        assert all(torch.equal(a, b) for a, b in zip(layer.packed().values(), held[path], strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "lora",
    [
        {"targets": ("q_proj", "embed_tokens")},
        {"targets": ("embed_tokens",), "tied": True},
        {"targets": ("down_proj", "lm_head")},
        {"targets": ("all-linear",), "trainable": ("norm",)},
        {"targets": ("all-linear",), "trainable": ("embedding",)},
        {"targets": ("q_proj",), "trainable": ("head",)},
    ],
    ids=["table", "tied table and head", "head", "norms", "whole table", "whole head"],
)
def test_tables_heads_and_whole_parts_train_beside_packed_layers(lora: dict[str, Any], kind: str) -> None:
    model = adapted("llama", kind, **lora)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(packed_layers(model)) == 14
    assert lora.get("tied", False) == any(type(a).__name__ == "TiedHead" for _, a in adapters(model))
    with unrounded():
        found, expected = step(model), by_definition(dense_twin(model))
    assert found[1].keys() == trained
    assert farthest(found, expected) < CLOSE


@pytest.mark.parametrize("kind", KINDS)
def test_biases_train_beside_packed_weights(kind: str) -> None:
    model = adapted("llama-bias", kind, trainable=("bias",))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert sum(name.endswith("bias") for name in trained) == 14
    twin = dense_twin(model)
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_(name in trained)
    with unrounded():
        found, expected = step(model), by_definition(twin)
    assert found[1].keys() == trained
    assert farthest(found, expected) < CLOSE
