"""Runs on mixtures whose experts are one parameter: exact when resumed, and the same model once merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import truetune
from families import perturb
from mixtures import MIXTURES, write_mixture
from training_runs import cut_after, differences, run_sft, write_rows
from truetune.adapters import files
from truetune.adapters.bank import Bank
from truetune.adapters.expert_lora import ExpertsLoRA
from truetune.adapters.inject import adapters
from truetune.config.lora import LoRA
from truetune.config.merge import MergeConfig
from truetune.config.resolve import resolve
from truetune.errors import AdapterError
from truetune.recipes import merge

BOTH = ("experts.gate_up_proj", "experts.down_proj")
IDS = torch.arange(10)[None]


@pytest.fixture
def mixture(tiny_model: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A folder with a tiny mixture."""
    return write_mixture(tiny_model, tmp_path / "mixture", request.param)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def merged(base: Path, adapter: Path, out: Path) -> None:
    flags = {"model": str(base), "adapter": (str(adapter),), "out": str(out)}
    merge.run(resolve(MergeConfig, file=None, flags=flags))


@pytest.mark.parametrize("mixture", ["mixtral"], indirect=True)
def test_a_run_learns_and_resumed_is_the_run_to_the_bit(mixture: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl")
    flags: dict[str, Any] = {"target_parameters": BOTH, "targets": ("none",), "save_every": 1, "keep": 9}
    report = run_sft(mixture, data, tmp_path / "whole", **flags)
    held = load_file(Path(report["result"]) / files.WEIGHTS)
    assert len(held) == 8
    assert all(tensor.abs().max() > 0 for tensor in held.values())
    out = cut_after(tmp_path / "whole", 3, tmp_path / "resumed")
    run_sft(mixture, data, out, resume="auto", **flags)
    assert differences(tmp_path / "whole", out) == []


@pytest.mark.parametrize("mixture", MIXTURES, indirect=True)
@pytest.mark.parametrize("form", ["one by one", "stacked"])
def test_a_merge_of_files_computes_the_same(mixture: Path, form: str, tmp_path: Path) -> None:
    model = truetune.load(str(mixture))
    if form == "stacked":  # as GPT-OSS's files hold them
        names = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        save_file(names, mixture / "model.safetensors", metadata={"format": "pt"})
    truetune.attach(model, LoRA(rank=3, targets=("q_proj",), target_parameters=BOTH))
    perturb(model)
    files.save(model, tmp_path / "adapter", base=None)
    merged(mixture, tmp_path / "adapter", tmp_path / "out")
    result = load_file(tmp_path / "out" / "model.safetensors")
    stacked = [name for name in result if name.endswith(("gate_up_proj", "experts.down_proj"))]
    assert bool(stacked) == (form == "stacked")
    torch.testing.assert_close(logits(truetune.load(str(tmp_path / "out"))), logits(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mixture", ["qwen3-moe"], indirect=True)
@pytest.mark.parametrize("quant", ["int8", "nf4"])
def test_beside_a_packed_base_experts_may_stay_dense(mixture: Path, quant: Any) -> None:
    model = truetune.load(str(mixture), quant=quant, quant_skip=["experts"])
    before = logits(model)
    truetune.attach(model, LoRA(rank=2, target_parameters=BOTH))
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-4)
    found = [layer.base for _, layer in adapters(model) if isinstance(layer, ExpertsLoRA)]
    assert [layer.gate_up_proj.is_floating_point() for layer in found] == [True, True]
    perturb(model)
    assert (logits(model) - before).abs().max() > 1e-3


@pytest.mark.parametrize("mixture", ["qwen3-moe"], indirect=True)
def test_by_name_it_comes_and_goes_and_has_no_sum(mixture: Path, tmp_path: Path) -> None:
    model, alone = truetune.load(str(mixture)), truetune.load(str(mixture))
    truetune.attach(alone, LoRA(rank=2, target_parameters=BOTH))
    perturb(alone)
    files.save(alone, tmp_path / "adapter", base=None)
    before, bank = logits(model), Bank(model)
    for name in ("one", "two"):
        bank.add(name, files.read(tmp_path / "adapter"))
    bank.use("one")
    assert torch.equal(logits(model), logits(alone))
    bank.use(None)
    assert torch.equal(logits(model), before)
    with pytest.raises(AdapterError, match="experts"):
        bank.use(["one", "two"], [0.5, 0.5])
    assert torch.equal(logits(model), before)
