"""``truetune merge`` of every method that folds into weights: the merged model answers as base and adapter did."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import truetune
from families import distance, logits, perturb
from method_checks import CLOSE
from packed import save_base
from truetune.adapters import files
from truetune.adapters.inject import attach, settle
from truetune.config.adapter import AdapterConfig
from truetune.config.lora import AdaLoRA, VeRA
from truetune.config.other_methods import IA3, BitFit

METHODS: dict[str, AdapterConfig] = {
    "ia3": IA3(),
    "ia3-bias": IA3(trainable=("bias", "norm")),
    "vera": VeRA(rank=8),
    "vera-seed": VeRA(rank=8, save_projection=False, projection_seed=3),
    "adalora": AdaLoRA(rank=4, target_rank=2),
    "bitfit": BitFit(),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["gpt2", "bloom", "bigcode", "qwen2"])
def test_merged_is_live(family: str, method: str, tmp_path: Path) -> None:
    base = save_base(family, tmp_path / "base")
    live = AutoModelForCausalLM.from_pretrained(base)
    before = logits(live)
    attach(live, METHODS[method])
    perturb(live)
    settle(live)
    files.save(live, tmp_path / "adapter", base=str(base))
    truetune.merge(str(base), str(tmp_path / "adapter"), str(tmp_path / "merged"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert distance(logits(merged), logits(live)) <= CLOSE
    assert distance(logits(merged), before) > 1e-3
