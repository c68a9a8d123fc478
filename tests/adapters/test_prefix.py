"""Prefix tuning: PEFT's keys and values in every family's attention, by positions that are computed like any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import GPTNeoXConfig, LlamaConfig, LlamaForCausalLM

from families import FAMILIES, distance, logits, perturb, token_rows
from method_checks import CLOSE, EACH, base
from peft_peer import read_by_peft, saved_by_peft, theirs, trained_by
from training_runs import cut_after, differences, run_sft, write_rows
from truetune.adapters import files
from truetune.adapters.inject import attach
from truetune.config.other_methods import Prefix
from truetune.errors import AdapterError
from virtual_checks import behind, check, same_step, step, text_logits

THREE = Prefix(virtual_tokens=3)
# Qwen 3 is refused; for this table's GPT-NeoX, PEFT goes by num_key_value_heads, which that model does not read.
COMMON = [name for name in FAMILIES if name not in ("qwen3", "neox")]


def peft_logits(model: Any) -> torch.Tensor:
    ids = token_rows()
    with torch.no_grad():
        scores: torch.Tensor = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return scores


@pytest.mark.parametrize(("name", "form"), EACH)
def test_it_learns_is_read_back_and_generates_alike(name: str, form: str, tmp_path: Path) -> None:
    check(name, form, THREE, tmp_path, lr=0.2)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_rows_that_a_network_makes_do_too(name: str, tmp_path: Path) -> None:
    check(name, "float32", Prefix(virtual_tokens=3, projection=True), tmp_path, lr=0.05)
    assert list(load_file(tmp_path / files.WEIGHTS)) == ["prompt_embeddings"]


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("family", COMMON)
def test_peft_reads_ours(family: str, projection: bool, tmp_path: Path) -> None:
    live = FAMILIES[family].make()
    attach(live, Prefix(virtual_tokens=3, projection=projection), seed=3)
    perturb(live)
    files.save(live, tmp_path, base=None)
    assert distance(text_logits(live), peft_logits(read_by_peft(family, tmp_path))) <= CLOSE


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("family", COMMON)
def test_we_read_pefts_and_train_as_many(family: str, projection: bool, tmp_path: Path) -> None:
    settings = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=projection)
    foreign = theirs(family, settings)
    live = FAMILIES[family].make()
    files.load(live, files.read(saved_by_peft(foreign, tmp_path)))
    assert distance(text_logits(live), peft_logits(foreign)) <= CLOSE
    assert distance(text_logits(live), text_logits(FAMILIES[family].make())) > 1e-3
    attached = FAMILIES[family].make()
    attach(attached, Prefix(virtual_tokens=3, projection=projection))
    assert trained_by(attached) == trained_by(foreign)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma2"])
def test_packed_fused_and_recomputed_steps_are_the_same_step(name: str) -> None:
    model = base(name)
    attach(model, THREE)
    perturb(model)
    padded = step(model, packing=False)
    assert same_step(step(model, packing=True), padded)
    assert same_step(step(model, packing=True, fused=False), padded)
    assert same_step(step(model, packing=True, recompute="full"), padded)
    assert same_step(step(model, packing=True, fused=False, recompute="full"), padded)


def test_a_head_that_turns_in_part_keeps_the_stored_keys() -> None:
    """GPT-NeoX puts a quarter of each head through the rotation; what reaches its cache is what the file holds."""
    torch.manual_seed(0)
    settings = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    model = FAMILIES["neox"].make()
    model = type(model)(GPTNeoXConfig(**settings, num_attention_heads=4, rotary_pct=0.25)).eval()
    attach(model, THREE)
    perturb(model)
    stored = model.get_input_embeddings().whole().detach().view(3, 2, 2, 4, 16)
    with torch.no_grad():
        cache = model(input_ids=behind(model, torch.tensor([[1, 2, 3]])), use_cache=True).past_key_values
    for number, layer in enumerate(cache.layers):
        for kind, kept in enumerate((layer.keys, layer.values)):
            assert distance(kept[0, :, :3].transpose(0, 1), stored[:, number, kind]) <= CLOSE


def test_without_its_virtual_tokens_a_text_is_the_bases() -> None:
    model = base("llama")
    before = logits(model)
    attach(model, THREE)
    perturb(model)
    assert distance(text_logits(model), before) > 1e-3
    assert torch.equal(logits(model), before)


def test_embeddings_in_place_of_ids_are_refused() -> None:
    """The prefix goes by the ids of the batch: with the last batch's it would land anywhere."""
    model = base("llama")
    attach(model, THREE)
    text_logits(model)
    with pytest.raises(AdapterError, match="input_ids"):
        model(inputs_embeds=torch.zeros(1, 5, 32))


def test_a_norm_behind_the_keys_is_refused_by_name() -> None:
    with pytest.raises(AdapterError, match=r"qwen3.*norm"):
        attach(base("qwen3"), THREE)


def test_positions_that_turn_by_length_are_refused_by_name() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        rope_parameters=rope,
    )  # fmt: skip
    with pytest.raises(AdapterError, match="length"):
        attach(LlamaForCausalLM(config), THREE)


@pytest.mark.parametrize("projection", [False, True])
def test_a_resumed_run_is_the_run_to_the_bit(projection: bool, tiny_model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl")
    flags: dict[str, Any] = {"method": "prefix", "virtual_tokens": 4, "projection": projection, "save_every": 1}
    flags |= {"keep": 9, "val_split": 0.2}
    run_sft(tiny_model, data, tmp_path / "whole", **flags)
    out = cut_after(tmp_path / "whole", 3, tmp_path / "resumed")
    run_sft(tiny_model, data, out, resume="auto", **flags)
    assert differences(tmp_path / "whole", out) == []
