"""LLaMA-Adapter: PEFT's prompts beside an attention, in every family and whatever way the attention is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from families import FAMILIES, distance, logits, perturb
from method_checks import CLOSE, EACH, base
from peft_peer import read_by_peft, saved_by_peft, theirs, trained_by
from training_runs import cut_after, differences, run_sft, write_rows
from truetune.adapters import files
from truetune.adapters.inject import adapters, attach
from truetune.config.other_methods import LlamaAdapter
from truetune.errors import AdapterError
from virtual_checks import check, same_step, step

TWO = LlamaAdapter(adapter_length=3, adapter_layers=2)
SHARED = ("llama", "gpt2", "mistral")  # with PEFT


@pytest.mark.parametrize(("name", "form"), EACH)
def test_it_learns_is_read_back_and_generates_alike(name: str, form: str, tmp_path: Path) -> None:
    check(name, form, TWO, tmp_path, lr=0.1)


@pytest.mark.parametrize("family", SHARED)
def test_peft_reads_ours(family: str, tmp_path: Path) -> None:
    live = FAMILIES[family].make()
    attach(live, LlamaAdapter(adapter_length=3, adapter_layers=1), seed=3)
    perturb(live)
    files.save(live, tmp_path, base=None)
    assert distance(logits(live), logits(read_by_peft(family, tmp_path))) <= CLOSE
    assert distance(logits(live), logits(FAMILIES[family].make())) > 1e-3


@pytest.mark.parametrize("family", SHARED)
def test_we_read_pefts_and_train_as_many(family: str, tmp_path: Path) -> None:
    foreign = theirs(family, peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=2))
    live = FAMILIES[family].make()
    files.load(live, files.read(saved_by_peft(foreign, tmp_path)))
    assert distance(logits(live), logits(foreign)) <= CLOSE
    attached = FAMILIES[family].make()
    attach(attached, TWO)
    assert trained_by(attached) == trained_by(foreign)


@pytest.mark.parametrize("family", FAMILIES)
def test_untrained_it_changes_nothing(family: str) -> None:
    model = FAMILIES[family].make()
    before = logits(model)
    attach(model, TWO)
    assert distance(logits(model), before) <= 1e-7
    assert len(list(adapters(model))) == 2


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "qwen3"])
def test_packed_and_recomputed_steps_are_the_same_step(name: str) -> None:
    model = base(name)
    attach(model, LlamaAdapter(adapter_length=3, adapter_layers=1))
    perturb(model)
    padded = step(model, packing=False)
    assert same_step(step(model, packing=True), padded)
    assert same_step(step(model, packing=True, recompute="full"), padded)


def test_it_computes_its_formula() -> None:
    """Without heads that share keys: what is added is the definition's, for queries turned by their positions."""
    model = FAMILIES["llama"].make(num_key_value_heads=4)
    attach(model, LlamaAdapter(adapter_length=3, adapter_layers=1))
    perturb(model)
    (_, adapter), *_ = adapters(model)
    attention = adapter.base
    hidden, positions = torch.randn(1, 5, 32), torch.arange(5)[None]
    cos, sin = model.model.rotary_emb(hidden, positions)
    given: dict[str, Any] = {"position_embeddings": (cos, sin), "attention_mask": None}
    with torch.no_grad():
        added = adapter(hidden, **given)[0] - attention(hidden, **given)[0]
        q = attention.q_proj(hidden).view(1, 5, 4, 8)
        half = torch.cat([-q[..., 4:], q[..., :4]], dim=-1)
        q = q * cos[:, :, None] + half * sin[:, :, None]
        k, v = (layer(adapter.prompt[0]).view(3, 4, 8) for layer in (attention.k_proj, attention.v_proj))
        mixed = torch.stack([torch.softmax(q[0, :, h] @ k[:, h].T / 8**0.5, dim=-1) @ v[:, h] for h in range(4)], dim=1)
        expected = attention.o_proj(adapter.gate * mixed.flatten(1))
    assert distance(added[0], expected) <= CLOSE


@pytest.mark.parametrize(("asked", "found"), [(3, "the model has 2"), (None, "lowest 2")])
def test_layers_that_are_not_there_are_refused(asked: int | None, found: str) -> None:
    with pytest.raises(AdapterError, match=found):
        attach(base("llama"), LlamaAdapter(adapter_layers=asked))


def test_a_resumed_run_is_the_run_to_the_bit(tiny_model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl")
    flags: dict[str, Any] = {"method": "llama-adapter", "adapter_layers": 2, "save_every": 1, "keep": 9}
    run_sft(tiny_model, data, tmp_path / "whole", **flags)
    out = cut_after(tmp_path / "whole", 3, tmp_path / "resumed")
    run_sft(tiny_model, data, out, resume="auto", **flags)
    assert differences(tmp_path / "whole", out) == []
