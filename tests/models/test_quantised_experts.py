"""Mixtures with packed experts: loaded, written and read again, trained beside, merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import truetune
from families import perturb
from mixtures import write_mixture
from training_runs import cut_after, differences, run_sft, write_rows
from truetune.config.lora import LoRA
from truetune.config.merge import MergeConfig
from truetune.config.resolve import resolve
from truetune.errors import ModelError, QuantizationError
from truetune.models import load
from truetune.models.streaming import streamed, streams_of
from truetune.quant.experts import QuantExperts
from truetune.quant.linear8bit import unrounded
from truetune.quant.packed import Packed
from truetune.recipes import merge
from truetune.train.estimate import _frozen_bytes

BOTH = ("experts.gate_up_proj", "experts.down_proj")
IDS = torch.arange(12)[None]
RECIPES: dict[str, dict[str, Any]] = {
    "int8": {"quant": "int8"},
    "nf4": {"quant": "nf4"},
    "nf4, double": {"quant": "nf4", "double_quant": True},
}


@pytest.fixture
def mixture(tiny_model: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    return write_mixture(tiny_model, tmp_path / "mixture", getattr(request, "param", "mixtral"))


def packed_experts(model: Any) -> list[QuantExperts]:
    return [module for module in model.modules() if isinstance(module, QuantExperts)]


def logits(model: Any) -> Tensor:
    with torch.no_grad(), unrounded():
        return model.eval()(IDS).logits


def dense_twin(model: Any, base: Path) -> Any:
    """transformers' own model with the weights that a packed one's codes stand for."""
    twin = truetune.load(str(base))
    for path, module in model.named_modules():
        if isinstance(module, QuantExperts):
            for name in module.names:
                getattr(twin.get_submodule(path), name).data = module.dense(name)
        elif hasattr(module, "frozen_weight"):
            twin.get_submodule(path).weight.data = module.dense()
    return twin


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("mixture", ["mixtral", "qwen3-moe", "gpt-oss"], indirect=True)
def test_packed_while_read_and_packed_before_are_the_same_model(mixture: Path, recipe: str, tmp_path: Path) -> None:
    model = truetune.load(str(mixture), **RECIPES[recipe])
    assert len(packed_experts(model)) == 2
    torch.testing.assert_close(logits(model), logits(dense_twin(model, mixture)), atol=2e-6, rtol=1e-5)
    said = truetune.quantize(str(mixture), str(tmp_path / "packed"), **RECIPES[recipe])
    assert 0.0 < said["relative_error"] < 0.2
    again = truetune.load(str(tmp_path / "packed"))
    assert len(packed_experts(again)) == 2
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("quant", ["int8", "nf4"])
def test_no_other_program_takes_packed_experts_for_something_else(mixture: Path, quant: str, tmp_path: Path) -> None:
    """transformers passes over methods it does not know, and codes of 8 bits in a weight's shape would be weights."""
    truetune.quantize(str(mixture), str(tmp_path / "packed"), quant=quant)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    truetune.quantize(str(mixture), str(tmp_path / "open"), quant="nf4", quant_skip=["experts"])
    said = json.loads((tmp_path / "open" / "config.json").read_text())["quantization_config"]
    assert said["quant_method"] == "bitsandbytes"
    model = truetune.load(str(tmp_path / "open"))
    assert not packed_experts(model)
    assert any(hasattr(module, "frozen_weight") for module in model.modules())


def test_a_part_may_be_left_dense(mixture: Path, tmp_path: Path) -> None:
    model = truetune.load(str(mixture), quant="nf4", quant_skip=["down_proj"])
    assert [layer.names for layer in packed_experts(model)] == [("gate_up_proj",)] * 2
    truetune.quantize(str(mixture), str(tmp_path / "packed"), quant="nf4", quant_skip=["down_proj"])
    assert torch.equal(logits(truetune.load(str(tmp_path / "packed"))), logits(model))


def test_the_forecast_is_what_the_model_takes(mixture: Path) -> None:
    config = load.load_config(str(mixture))
    recipe = load.QuantRecipe(kind="nf4", experts=True)
    skeleton = load.skeleton(config, dtype=torch.float32)
    load.plan_quantised(skeleton, recipe, dtype=torch.float32)
    assert load.stacks_remark(skeleton) is None
    model = truetune.load(str(mixture), quant="nf4")
    packed = [tensor for module in model.modules() if isinstance(module, Packed) for tensor in module.stored()]
    codes = {path: m.nbytes_by_parameter for path, m in model.named_modules() if isinstance(m, Packed)}
    own = {f"{path}.{name}" for path, names in codes.items() for name in names}
    rest = sum(p.nbytes for name, p in model.named_parameters() if name not in own)
    skeleton.requires_grad_(False)
    assert _frozen_bytes(skeleton, 4) == rest + sum(tensor.nbytes for tensor in packed)


BIASES = ("experts.gate_up_proj_bias", "experts.down_proj_bias")


@pytest.mark.parametrize(
    ("mixture", "adapted"),
    [("mixtral", BOTH), ("gpt-oss", BOTH), ("gpt-oss", BIASES), ("gpt-oss", (BOTH[0], BIASES[0]))],
    indirect=["mixture"],
    ids=["mixtral", "gpt-oss", "its biases", "a stack with its bias"],
)
def test_lora_on_packed_experts_learns_as_on_their_dense_weights(mixture: Path, adapted: tuple[str, ...]) -> None:
    """Also where it is no product of the experts' own that is added to, and W + s B A stands in for W."""
    found, model = [], truetune.load(str(mixture), quant="nf4")
    for one in (model, dense_twin(model, mixture)):
        truetune.attach(one, LoRA(rank=2, targets=("none",), target_parameters=adapted))
        perturb(one)
        y = one.train()(IDS, labels=IDS)
        y.loss.backward()
        found.append({name: p.grad for name, p in one.named_parameters() if p.requires_grad})
        found[-1]["logits"] = y.logits.detach()
    assert found[0].keys() == found[1].keys()
    assert len(found[0]) == 8 + 1
    assert all(grad is not None and grad.abs().max() > 0 for grad in found[0].values())
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name], atol=1e-6, rtol=1e-4)


def merged(base: Path, adapter: Path, out: Path, **flags: Any) -> dict[str, Any]:
    given = {"model": str(base), "adapter": (str(adapter),), "out": str(out), **flags}
    return merge.run(resolve(MergeConfig, file=None, flags=given))


@pytest.mark.parametrize("form", ["from the originals", "from a packed checkpoint"])
@pytest.mark.parametrize("quant", ["int8", "nf4"])
def test_a_run_is_exact_and_merged_is_the_live_model(mixture: Path, quant: str, form: str, tmp_path: Path) -> None:
    data, base = write_rows(tmp_path / "rows.jsonl"), mixture
    flags: dict[str, Any] = {"target_parameters": BOTH, "targets": ("q_proj",), "save_every": 1, "keep": 9}
    if form == "from the originals":
        flags |= {"quant": quant, "double_quant": quant == "nf4"}
    else:
        base = tmp_path / "packed"
        truetune.quantize(str(mixture), str(base), quant=quant, double_quant=quant == "nf4")
    report = run_sft(base, data, tmp_path / "whole", **flags)
    out = cut_after(tmp_path / "whole", 3, tmp_path / "resumed")
    run_sft(base, data, out, resume="auto", **flags)
    assert differences(tmp_path / "whole", out) == []
    adapter = Path(report["result"])
    again = {} if form != "from the originals" else {"quant": quant, "double_quant": quant == "nf4"}
    live = truetune.load(str(base), **again)
    truetune.load_adapter(live, str(adapter))
    said = merged(base, adapter, tmp_path / "merged")
    assert said["onto"] == "dequantized"
    assert said["drift"] < 1e-6
    torch.testing.assert_close(logits(truetune.load(str(tmp_path / "merged"))), logits(live), atol=1e-5, rtol=1e-4)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(theirs), logits(live), atol=1e-5, rtol=1e-4)


def test_onto_the_originals_the_drift_is_told(mixture: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl")
    flags: dict[str, Any] = {"target_parameters": BOTH, "targets": ("none",), "quant": "nf4"}
    adapter = Path(run_sft(mixture, data, tmp_path / "run", **flags)["result"])
    said = merged(mixture, adapter, tmp_path / "merged", onto="original", quant="nf4")
    assert 0.03 < said["drift"] < 0.2
    assert said["drift_packed"] > 0.0
    assert len(packed_experts(truetune.load(str(tmp_path / "merged")))) == 2


def test_an_expert_that_is_not_finite_stops_the_loading_and_the_writing(mixture: Path, tmp_path: Path) -> None:
    held = load_file(mixture / "model.safetensors")
    name = next(name for name in held if ".experts.2." in name)
    held[name][0, 0] = torch.inf
    save_file(held, mixture / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(QuantizationError, match="expert 2"):
        truetune.load(str(mixture), quant="nf4")
    with pytest.raises(QuantizationError, match="expert 2"):
        truetune.quantize(str(mixture), str(tmp_path / "packed"), quant="nf4")
    assert not (tmp_path / "packed").exists()


def test_codes_without_their_scales_are_refused_by_name(mixture: Path, tmp_path: Path) -> None:
    out = tmp_path / "packed"
    truetune.quantize(str(mixture), str(out), quant="nf4")
    held = load_file(out / "model.safetensors")
    kept = {name: t for name, t in held.items() if "layers.1.mlp.experts.down_proj." not in name}
    save_file(kept, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((QuantizationError, ModelError), match=r"layers\.1\.mlp\.experts\.down_proj"):
        truetune.load(str(out))


def test_packed_experts_can_stay_on_disk(mixture: Path, tmp_path: Path) -> None:
    truetune.quantize(str(mixture), str(tmp_path / "packed"), quant="nf4", double_quant=True)
    model = truetune.load(str(tmp_path / "packed"))
    before, streams = logits(model), streams_of(model)
    mapped = {tensor.data_ptr() for pages in streams.layers for tensor in pages.tensors}
    codes = [getattr(layer, name) for layer in packed_experts(model) for name in layer.names]
    assert len(codes) == 4
    assert {tensor.data_ptr() for tensor in codes} <= mapped
    with streamed(model):
        assert torch.equal(logits(model), before)
