"""Low-rank methods through whole runs: on every base and family, resumed to the bit, and merged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import truetune
from families import FAMILIES, distance, logits, perturb
from method_checks import CLOSE, EACH, check
from packed import save_base
from training_runs import cut_after, differences, run_sft, same_tensors, write_rows
from truetune.adapters import files
from truetune.adapters.inject import attach, settle
from truetune.config.lora import DoRA, LoRA

RUNS: dict[str, dict[str, Any]] = {
    "dora": {"method": "dora", "dropout": 0.1},
    "dora-low-rank": {"method": "dora", "dropout": 0.1, "dora_dropout": "low-rank", "dtype": "bfloat16"},
    "dora-8bit": {"method": "dora", "optim": "adamw8bit", "quant": "nf4"},
    "pissa": {"init": "pissa", "optim": "lion8bit", "weight_decay": 0.1, "lr": 1e-3},
    "patterns": {"rank_pattern": ("q_proj=2",), "alpha_pattern": ("layers.1.*=3",), "lora_bias": True, "layers": (1,)},
}


@pytest.mark.parametrize(("name", "form"), EACH)
def test_lora_learns_is_read_back_and_merges(name: str, form: str, tmp_path: Path) -> None:
    check(name, form, LoRA(rank=8), tmp_path, lr=1e-2)


@pytest.mark.parametrize(
    ("name", "slices"), [("gpt2", "qkv=q,v"), ("bigcode", "qkv=q,v"), ("bloom", "qkv=q,v"), ("neox", "qkv=k")]
)
@pytest.mark.parametrize("form", ["float32", "bfloat16", "nf4"])
def test_slices_learn_are_read_back_and_merge(name: str, slices: str, form: str, tmp_path: Path) -> None:
    check(name, form, LoRA(rank=8, slices=(slices,)), tmp_path, lr=1e-2)


@pytest.mark.parametrize("kind", RUNS)
def test_a_resumed_run_is_the_run_to_the_bit(kind: str, make_tiny: Callable[..., Path], tmp_path: Path) -> None:
    base = make_tiny(tmp_path / "base", attention_bias=True, mlp_bias=True)
    data = write_rows(tmp_path / "rows.jsonl")
    settings: dict[str, Any] = {"save_every": 1, "keep": 100, "max_steps": 5, **RUNS[kind]}
    run_sft(base, data, tmp_path / "whole", **settings)
    early, late = (tmp_path / "whole" / "checkpoints" / f"step-00000{n}" / "adapter" for n in (1, 5))
    assert not same_tensors(early / files.WEIGHTS, late / files.WEIGHTS)
    out = cut_after(tmp_path / "whole", 2, tmp_path / "resumed")
    run_sft(base, data, out, resume="auto", **settings)
    assert differences(tmp_path / "whole", out) == []


def test_the_start_of_pissa_does_not_move_and_the_result_is_plain(
    make_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    base = make_tiny(tmp_path / "base")
    data = write_rows(tmp_path / "rows.jsonl")
    run_sft(base, data, tmp_path / "out", save_every=1, keep=100, max_steps=3, **RUNS["pissa"])
    first, last = (
        load_file(tmp_path / "out" / "checkpoints" / f"step-00000{n}" / "adapter" / files.WEIGHTS) for n in (1, 3)
    )
    starts = [name for name in first if ".start_" in name]
    assert len(starts) == 28
    assert all(first[name].equal(last[name]) for name in starts)
    result = files.read(tmp_path / "out" / "adapter")
    assert not [name for name in result.tensors if ".start_" in name]
    assert (result.config["r"], result.config["init_lora_weights"]) == (8, True)


MERGED = {
    "lora-bias": ("gpt2", LoRA(rank=4, lora_bias=True)),
    "dora": ("gpt2", DoRA(rank=4)),
    "dora-bloom": ("bloom", DoRA(rank=4)),
    "dora-table": ("llama", DoRA(rank=4, targets=("all-linear", "embed_tokens", "lm_head"))),
    "slices": ("bigcode", LoRA(rank=4, slices=("qkv=q,v",))),
    "pissa": ("llama", LoRA(rank=4, init="pissa")),
}


@pytest.mark.parametrize("settled", [False, True], ids=["checkpoint", "result"])
@pytest.mark.parametrize("kind", MERGED)
def test_the_merged_model_answers_as_the_live_one(kind: str, settled: bool, tmp_path: Path) -> None:
    family, settings = MERGED[kind]
    base = save_base(family, tmp_path / "base")
    live = AutoModelForCausalLM.from_pretrained(base)
    attach(live, settings)
    perturb(live)
    if settled:
        settle(live)
    files.save(live, tmp_path / "adapter", base=str(base))
    truetune.merge(str(base), str(tmp_path / "adapter"), str(tmp_path / "merged"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert distance(logits(merged), logits(live)) <= CLOSE
    assert distance(logits(FAMILIES[family].make()), logits(live)) > 1e-3
