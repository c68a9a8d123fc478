"""P-tuning: its file is what the network made, its checkpoints are the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from families import FAMILIES, distance, perturb, token_rows
from method_checks import CLOSE, EACH, base
from peft_peer import read_by_peft, saved_by_peft, theirs, trained_by
from training_runs import cut_after, differences, run_sft, write_rows
from truetune.adapters import files
from truetune.adapters.inject import attach
from truetune.config.other_methods import PTuning
from virtual_checks import check, same_step, step, text_logits

ENCODERS = ("mlp", "lstm")


def peft_logits(model: Any) -> torch.Tensor:
    ids = token_rows()
    with torch.no_grad():
        scores: torch.Tensor = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return scores[:, 3:]


@pytest.mark.parametrize(("name", "form"), EACH)
def test_it_learns_is_read_back_and_generates_alike(name: str, form: str, tmp_path: Path) -> None:
    check(name, form, PTuning(virtual_tokens=3), tmp_path, lr=1e-2)
    assert list(load_file(tmp_path / files.WEIGHTS)) == ["prompt_embeddings"]


@pytest.mark.parametrize("encoder", ENCODERS)
def test_peft_reads_ours(encoder: str, tmp_path: Path) -> None:
    live = base("llama")
    attach(live, PTuning(virtual_tokens=3, encoder=encoder), seed=3)
    perturb(live)
    files.save(live, tmp_path, base=None)
    assert distance(text_logits(live), peft_logits(read_by_peft("llama", tmp_path))) <= CLOSE


@pytest.mark.parametrize("encoder", ENCODERS)
def test_we_read_pefts_and_train_as_many(encoder: str, tmp_path: Path) -> None:
    settings = {"encoder_reparameterization_type": encoder.upper(), "encoder_hidden_size": 24}
    foreign = theirs("llama", peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, **settings))
    live = FAMILIES["llama"].make()
    files.load(live, files.read(saved_by_peft(foreign, tmp_path)))
    assert distance(text_logits(live), peft_logits(foreign)) <= CLOSE
    attached = base("llama")
    attach(attached, PTuning(virtual_tokens=3, encoder=encoder, encoder_hidden=24))
    assert trained_by(attached) == trained_by(foreign)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_the_network_computes_what_pefts_does(encoder: str) -> None:
    settings = {"encoder_reparameterization_type": encoder.upper()}
    foreign = theirs("llama", peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, **settings))
    live = base("llama")
    attach(live, PTuning(virtual_tokens=3, encoder=encoder))
    live.get_input_embeddings().encoder.load_state_dict(foreign.prompt_encoder["default"].state_dict())
    assert distance(text_logits(live), peft_logits(foreign)) <= CLOSE


def test_packed_and_recomputed_steps_are_the_same_step() -> None:
    model = base("llama")
    attach(model, PTuning(virtual_tokens=3))
    padded = step(model, packing=False)
    assert same_step(step(model, packing=True), padded)
    assert same_step(step(model, packing=True, recompute="full"), padded)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_resumed_run_is_the_run_to_the_bit(encoder: str, tiny_model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl")
    flags: dict[str, Any] = {"method": "ptuning", "virtual_tokens": 4, "encoder": encoder, "save_every": 1, "keep": 9}
    run_sft(tiny_model, data, tmp_path / "whole", **flags)
    out = cut_after(tmp_path / "whole", 3, tmp_path / "resumed")
    run_sft(tiny_model, data, out, resume="auto", **flags)
    assert differences(tmp_path / "whole", out) == []
