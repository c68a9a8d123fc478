"""What an estimate is made of, and what it may never do."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from truetune.adapters.inject import attach
from truetune.config.lora import LoRA
from truetune.train.estimate import (
    Demand,
    Economy,
    Estimate,
    count_parameters,
    estimate_memory,
    flops_per_token,
    text_shape,
)

RECOMPUTE = ("none", "cheap", "full")
SHAPE = {"hidden_size": 64, "intermediate_size": 172, "num_attention_heads": 4, "num_key_value_heads": 2,
         "num_hidden_layers": 6, "vocab_size": 1000}  # fmt: skip


def unloaded(**changes: Any) -> PreTrainedModel:
    """With adapters, on the meta device: an estimate reads no weights."""
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(SHAPE | changes)))
    attach(model, LoRA(rank=8))
    return model


def estimated(model: PreTrainedModel | None = None, **changes: Any) -> Estimate:
    """With ``changes`` of the demand or the economy, whichever has a field of that name."""
    model = model or unloaded()
    demand = Demand(storage=torch.bfloat16, micro_tokens=4096, trained_share=0.5, process=300.0, fused=True)
    names = {field.name for field in fields(Demand)}
    demand = replace(demand, **{name: value for name, value in changes.items() if name in names})
    economy: dict[str, Any] = {"recompute": "cheap"} | {k: v for k, v in changes.items() if k not in names}
    return estimate_memory(model, model.config, demand, Economy(**economy))


def test_the_total_is_the_sum_of_what_is_named() -> None:
    found = estimated()
    assert found.total == pytest.approx(found.process + found.weights + found.trained + found.activations)
    assert found.process == 300.0
    assert min(found.weights, found.trained, found.activations) > 0


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 4), (torch.bfloat16, 2)], ids=str)
def test_frozen_weights_are_counted_in_their_own_width_and_trained_ones_four_times_in_float32(
    dtype: torch.dtype, width: int
) -> None:
    model = unloaded()
    everything, trained = count_parameters(model)
    adapter = 6 * 8 * (4 * 64 + 2 * (64 + 32) + 2 * (64 + 172) + (172 + 64))  # ranks times both sizes of seven layers
    found = estimated(model, storage=dtype)
    assert trained == adapter
    assert found.trained == pytest.approx(adapter * 16 / 1e6)
    assert found.weights == pytest.approx((everything - adapter) * width / 1e6)


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("fused", [True, False])
def test_more_of_anything_takes_no_less(fused: bool, recompute: str) -> None:
    given = {"fused": fused, "recompute": recompute}
    by_tokens = [estimated(micro_tokens=n, **given).total for n in (1, 512, 4096, 65536)]
    by_layers = [estimated(unloaded(num_hidden_layers=n), **given).activations for n in (1, 2, 6, 30)]
    by_width = [estimated(unloaded(intermediate_size=n), **given).activations for n in (64, 172, 900)]
    by_share = [estimated(trained_share=share, micro_tokens=100, **given).total for share in (0.0, 0.1, 1.0)]
    for found in (by_tokens, by_layers, by_width, by_share):
        assert found == sorted(found)
        assert found[0] < found[-1]


def test_logits_of_long_rows_cost_no_more_than_a_chunk_of_them() -> None:
    few, many = (estimated(unloaded(vocab_size=n), micro_tokens=65536).activations for n in (100_000, 250_000))
    assert few == many


@pytest.mark.parametrize("layers", [2, 6, 40])
@pytest.mark.parametrize("fused", [True, False])
def test_computing_more_again_takes_no_more(fused: bool, layers: int) -> None:
    model = unloaded(num_hidden_layers=layers)
    none, cheap, full = (estimated(model, fused=fused, recompute=how).total for how in RECOMPUTE)
    assert full < none
    assert full <= cheap <= none
    assert (cheap < none) == fused  # there is nothing cheap to find in layers that are not fused


@pytest.mark.parametrize("fused", [True, False])
def test_each_layer_more_that_is_computed_again_takes_less(fused: bool) -> None:
    found = [estimated(fused=fused, full_layers=n).activations for n in range(6)]
    assert found == sorted(found, reverse=True)
    assert len(set(found)) == 6
    # To compute the last one again needs what keeping it does, and its input.
    last = estimated(fused=fused, full_layers=6).activations - found[-1]
    assert last == pytest.approx(4096 * 64 * 2 / 1e6)
    assert estimated(fused=fused, full_layers=6).total == estimated(fused=fused, recompute="full").total


def test_of_a_streamed_base_two_layers_are_in_memory_or_the_head() -> None:
    layer = (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 172 + 2 * 64) * 2 / 1e6
    head = 64 * 1000 * 2 / 1e6
    for layers in (6, 30):
        model = unloaded(num_hidden_layers=layers)
        resident, streamed = estimated(model), estimated(model, streamed=True)
        assert streamed.weights == pytest.approx(max(2 * layer, head))
        assert resident.weights > layers * layer
        assert (streamed.activations, streamed.trained) == (resident.activations, resident.trained)
    large = unloaded(vocab_size=50_000)
    assert estimated(large, streamed=True).weights == pytest.approx(50 * head)
    assert estimated(large, streamed=True, copied=7.0).weights == pytest.approx(50 * head + 7.0)


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize(
    "changes", [{}, {"head_dim": 64}, {"num_key_value_heads": 4, "intermediate_size": 64}], ids=str
)
def test_fused_layers_take_no_more_than_others(changes: dict[str, Any], recompute: str) -> None:
    model = unloaded(**changes)
    assert estimated(model, recompute=recompute).total < estimated(model, recompute=recompute, fused=False).total


def test_a_shared_tensor_counts_once() -> None:
    tied, untied = (count_parameters(unloaded(tie_word_embeddings=tie))[0] for tie in (True, False))
    assert untied - tied == 64 * 1000
    assert count_parameters(nn.Linear(3, 4).requires_grad_(False)) == (16, 0)


CONFIGS: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "LlamaConfig": (SHAPE, {"queries": 64, "keys": 32, "layers": 6, "hidden": 64, "inner": 172, "vocab": 1000}),
    "Qwen3Config": (
        SHAPE | {"head_dim": 32},
        {"queries": 128, "keys": 64, "layers": 6, "hidden": 64, "inner": 172, "vocab": 1000},
    ),
    "GPT2Config": (
        {"n_embd": 64, "n_layer": 6, "n_head": 4, "vocab_size": 1000},
        {"queries": 64, "keys": 64, "layers": 6, "hidden": 64, "inner": 256, "vocab": 1000},
    ),
    "BloomConfig": (
        {"hidden_size": 64, "n_layer": 6, "n_head": 4, "vocab_size": 1000},
        {"queries": 64, "keys": 64, "layers": 6, "hidden": 64, "inner": 256, "vocab": 1000},
    ),
    "OPTConfig": (
        {"hidden_size": 64, "ffn_dim": 172, "num_hidden_layers": 6, "num_attention_heads": 4, "vocab_size": 1000},
        {"queries": 64, "keys": 64, "layers": 6, "hidden": 64, "inner": 172, "vocab": 1000},
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_shape_is_read_by_whichever_names_a_config_has(name: str) -> None:
    settings, expected = CONFIGS[name]
    assert text_shape(getattr(transformers, name)(**settings)) == expected


def test_a_config_of_many_parts_is_read_at_its_text() -> None:
    config = transformers.Gemma3Config(text_config={**SHAPE, "head_dim": 16})
    assert text_shape(config)["layers"] == 6


def test_the_work_of_a_token_is_two_products_a_weight_or_three_where_the_base_learns() -> None:
    model = unloaded()
    head = 64 * 1000
    body = 500_000
    frozen, full = (flops_per_token(model.config, body, trained_share=0.25, trains_base=b) for b in (False, True))
    assert frozen == 4 * (body - head + head / 4)
    assert full == frozen * 6 / 4
