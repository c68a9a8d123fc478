"""Prompt tuning: the same numbers as PEFT's, in training and in generation, packed, padded and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import truetune
from families import FAMILIES, distance, perturb, token_rows
from method_checks import CLOSE, EACH, base
from peft_peer import read_by_peft, saved_by_peft, theirs, trained_by
from training_runs import checkpoints, cut_after, differences, run_sft, write_rows
from truetune.adapters import files
from truetune.adapters.inject import attach, detach
from truetune.adapters.virtual import virtual_ids
from truetune.config.adapter import AdapterConfig
from truetune.config.lora import LoRA
from truetune.config.other_methods import Prefix, Prompt
from truetune.errors import AdapterError, ConfigError
from truetune.models import forward
from virtual_checks import check, same_step, step, text_logits

THREE = Prompt(virtual_tokens=3)


def peft_logits(model: Any) -> torch.Tensor:
    ids = token_rows()
    with torch.no_grad():
        scores: torch.Tensor = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return scores[:, 3:]


@pytest.mark.parametrize(("name", "form"), EACH)
def test_it_learns_is_read_back_and_generates_alike(name: str, form: str, tmp_path: Path) -> None:
    check(name, form, THREE, tmp_path, lr=5e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_reads_ours(family: str, tmp_path: Path) -> None:
    live = FAMILIES[family].make()
    attach(live, THREE, seed=3)
    perturb(live)
    files.save(live, tmp_path, base=None)
    assert distance(text_logits(live), peft_logits(read_by_peft(family, tmp_path))) <= CLOSE


@pytest.mark.parametrize("family", FAMILIES)
def test_we_read_pefts(family: str, tmp_path: Path) -> None:
    foreign = theirs(family, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    live = FAMILIES[family].make()
    files.load(live, files.read(saved_by_peft(foreign, tmp_path)))
    assert distance(text_logits(live), peft_logits(foreign)) <= CLOSE
    assert distance(text_logits(live), text_logits(FAMILIES[family].make())) > 1e-3
    attached = FAMILIES[family].make()
    attach(attached, THREE)
    assert trained_by(attached) == trained_by(foreign)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_packed_fused_and_recomputed_steps_are_the_same_step(name: str) -> None:
    model = base(name)
    attach(model, THREE)
    padded = step(model, packing=False)
    assert same_step(step(model, packing=True), padded)
    assert same_step(step(model, packing=True, fused=False), padded)
    assert same_step(step(model, packing=True, recompute="full"), padded)


def test_it_starts_from_rows_of_the_table_or_from_a_text() -> None:
    model = base("llama")
    table = model.get_input_embeddings().weight.detach()
    attach(model, Prompt(virtual_tokens=5, prompt_text="some words"), prompt_ids=[7, 9])
    rows = model.get_input_embeddings().embeddings()
    assert torch.equal(rows, table[[7, 9, 7, 9, 7]])
    detach(model)
    assert virtual_ids(model) == []
    attach(model, THREE)
    rows = model.get_input_embeddings().embeddings()
    assert all((table == row).all(-1).any() for row in rows)


def test_a_text_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(AdapterError, match="--prompt-text"):
        attach(base("llama"), Prompt(prompt_text="some words"))


def test_it_does_not_merge(tmp_path: Path) -> None:
    folder = FAMILIES["llama"].make()
    folder.save_pretrained(tmp_path / "base")
    attach(folder, THREE)
    files.save(folder, tmp_path / "adapter", base=str(tmp_path / "base"))
    with pytest.raises(AdapterError, match="does not fold"):
        truetune.merge(str(tmp_path / "base"), str(tmp_path / "adapter"), str(tmp_path / "out"))


# --- runs ---------------------------------------------------------------------------------------------------------


def test_a_resumed_run_is_the_run_to_the_bit(tiny_model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl")
    flags: dict[str, Any] = {"method": "prompt", "virtual_tokens": 4, "prompt_text": "Count", "save_every": 1}
    flags |= {"keep": 9, "val_split": 0.2}
    run_sft(tiny_model, data, tmp_path / "whole", **flags)
    out = cut_after(tmp_path / "whole", 3, tmp_path / "resumed")
    run_sft(tiny_model, data, out, resume="auto", **flags)
    assert len(checkpoints(out)) > 3
    assert differences(tmp_path / "whole", out) == []


def test_virtual_tokens_are_no_data_and_need_room(tiny_model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl")
    plain = run_sft(tiny_model, data, tmp_path / "lora", dry_run=True)
    longer = run_sft(tiny_model, data, tmp_path / "prompt", method="prompt", dry_run=True)
    assert (longer["tokens"], longer["trained_tokens"]) == (plain["tokens"], plain["trained_tokens"])
    done = run_sft(tiny_model, data, tmp_path / "done", method="prompt", epochs=1)
    assert done["tokens"] == plain["tokens"]
    with pytest.raises(ConfigError, match="--virtual-tokens takes 20"):
        run_sft(tiny_model, data, tmp_path / "long", method="prompt", max_length=250, dry_run=True)


@pytest.mark.parametrize(
    "config",
    [Prompt(virtual_tokens=2), Prefix(virtual_tokens=2), LoRA(rank=2, targets=["embed_tokens"]), LoRA(token_rows=[5])],
    ids=["prompt", "prefix", "table", "rows"],
)
def test_what_is_trained_on_the_table_does_not_pass_for_the_models_own_dtype(config: AdapterConfig) -> None:
    """Products of a bf16 model are rounded up to few sizes; a kernel is compiled, and kept, for each size."""
    model = base("llama", "bfloat16")
    bare = [forward._spare(model, size) for size in (128, 129, 200)]
    attach(model, config)
    assert [forward._spare(model, size) for size in (128, 129, 200)] == bare
    assert bare[0] == 0 < bare[1]
