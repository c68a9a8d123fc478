"""Merging an adapter that was trained beside packed weights: what it is merged onto, and how far that is from it."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import truetune
from families import FAMILIES, distance, logits, perturb
from packed import KINDS, dense_twin, packed_layers, quantize, save_base, values
from truetune.adapters import files
from truetune.checkpoint.tensors import load, open_index
from truetune.config.lora import LoRA
from truetune.config.quant import QuantRecipe
from truetune.errors import ConfigError, ModelError, QuantizationError
from truetune.export.onto import Drift, Onto
from truetune.export.onto_experts import experts_on_quantised
from truetune.models.load import load_model
from truetune.quant.stack import Stack

CLOSE = 1e-5
ALL = LoRA(rank=4, alpha=8)


def train(base: Path, recipe: QuantRecipe | None, folder: Path, *, lora: LoRA = ALL, stored: bool = False,
          dtype: torch.dtype = torch.float32) -> PreTrainedModel:  # fmt: skip
    """The live model, with an adapter that is away from its start and also in ``folder``."""
    model = load_model(str(base), dtype=dtype, quant=None if stored else recipe)
    truetune.attach(model, lora, seed=3)
    perturb(model)
    card = {
        "quantisation": asdict(recipe) if recipe else None,
        "facts": {"compute": str(dtype).removeprefix("torch.")},
    }
    files.save(model, folder, base=str(base), card=card)
    return model.eval()


def merge(base: Path, tmp_path: Path, out: str = "out", **settings: Any) -> dict[str, Any]:
    return truetune.merge(str(base), str(tmp_path / "adapter"), str(tmp_path / out), **settings)


def reload(folder: Path) -> PreTrainedModel:
    """As transformers loads it: dense, nothing missing, nothing left over."""
    transformers.logging.disable_progress_bar()
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert {name: keys for name, keys in info.items() if keys} == {}
    assert not hasattr(model.config, "quantization_config")
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "bigcode", "bloom", "qwen3"])
def test_onto_the_dequantized_weights_it_is_the_live_model(family: str, kind: str, tmp_path: Path) -> None:
    """All packed layers are replaced, so that nothing is left of what packing changed; int8 also rounds inputs."""
    base = save_base(family, tmp_path / "base")
    targets = FAMILIES[family].targets[:1]  # the other layers were packed as well
    live = train(base, KINDS[kind], tmp_path / "adapter", lora=LoRA(rank=4, alpha=8, targets=targets))
    result = merge(base, tmp_path)
    merged = logits(reload(tmp_path / "out"))
    assert result["onto"] == "dequantized"
    assert result["drift"] < 1e-7
    assert result["forecast"]["disk_mb"] == pytest.approx(result["bytes"] / 1e6, abs=0.06)  # dense, in tenths of a MB
    assert distance(logits(dense_twin(live)), merged) <= CLOSE
    assert distance(logits(live), merged) <= (0.05 if kind == "int8" else CLOSE)
    assert open_index(tmp_path / "out").keys() == open_index(base).keys()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_onto_the_original_weights_it_is_the_adapter_on_the_dense_base(
    family: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_base(family, tmp_path / "base")
    live = train(base, KINDS[kind], tmp_path / "adapter")
    result = merge(base, tmp_path, onto="original")
    merged = reload(tmp_path / "out")
    dense = load_model(str(base), dtype=torch.float32)
    files.load(dense, files.read(tmp_path / "adapter"))
    assert distance(logits(dense), logits(merged)) <= CLOSE
    assert distance(logits(live), logits(merged)) > 1e-3
    assert result["drift"] == pytest.approx(drift(live, merged), rel=1e-3)
    said = capsys.readouterr().err
    assert f"{result['drift']:.2%}" in said
    assert "original" in said


def drift(live: PreTrainedModel, merged: PreTrainedModel) -> float:
    """|merged - live| / |live| over the weights of all packed layers."""
    squared = norm = 0.0
    for path in packed_layers(live):
        site = path.removesuffix(".base")
        adapter = live.get_submodule(site)
        exact = adapter.base.dense().float() + adapter.scale * adapter.lora_b @ adapter.lora_a  # type: ignore[operator,union-attr]
        found = merged.get_submodule(site).weight.float()
        found = found.T if adapter.base.transposed else found  # type: ignore[union-attr]
        squared += float((found - exact).detach().square().sum())
        norm += float(exact.detach().square().sum())
    return (squared / norm) ** 0.5


def test_the_original_is_farther_from_the_live_model_the_fewer_bits_it_had(tmp_path: Path) -> None:
    base, found = save_base("llama", tmp_path / "base"), {}
    for kind in ("int8", "nf4", "fp4"):
        folder = tmp_path / kind
        train(base, KINDS[kind], folder / "adapter")
        found[kind] = merge(base, folder, onto="original")["drift"]
    assert 1e-4 < found["int8"] < 0.1 * found["nf4"] < found["nf4"] < found["fp4"] < 0.5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2"])
def test_into_packed_files_it_is_the_live_model(family: str, kind: str, tmp_path: Path) -> None:
    base = save_base(family, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    out = quantize(base, tmp_path / "packed", KINDS[kind], max_shard_bytes=20_000)
    live = train(out, KINDS[kind], tmp_path / "adapter", stored=True)
    result = merge(out, tmp_path)
    merged = reload(tmp_path / "out")
    assert (result["onto"], result["drift"] < 1e-7) == ("dequantized", True)
    assert distance(logits(dense_twin(live)), logits(merged)) <= CLOSE
    assert open_index(tmp_path / "out").keys() == open_index(base).keys()
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config  # its nulls, too


def test_codes_in_other_storage_are_unpacked_too(tmp_path: Path) -> None:
    """``bnb_4bit_quant_storage``: codes that look like numbers of a floating type."""
    out = quantize(save_base("llama", tmp_path / "base"), tmp_path / "packed", KINDS["nf4"])
    tensors = load_file(out / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.dtype == torch.uint8 and name.endswith("weight"):
            tensors[name] = tensor.view(-1, 2).view(torch.bfloat16)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    live = train(out, KINDS["nf4"], tmp_path / "adapter", stored=True)
    assert len(packed_layers(live)) == 14
    merge(out, tmp_path)
    assert distance(logits(live), logits(reload(tmp_path / "out"))) <= CLOSE


@pytest.mark.parametrize("skip", [["lm_head", "norm", "model.layers.0"], None], ids=["wide", "none"])
def test_skip_lists_of_other_hands_are_followed(skip: list[str] | None, tmp_path: Path) -> None:
    """They may name what is no linear layer, and leave the list out; what was packed is what the files say."""
    base = save_base("llama", tmp_path / "base")
    recipe = QuantRecipe(kind="nf4", skip=("layers.0",) if skip else ())
    out = quantize(base, tmp_path / "packed", recipe)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["llm_int8_skip_modules"] = skip
    (out / "config.json").write_text(json.dumps(config))
    live = train(out, recipe, tmp_path / "adapter", stored=True)
    merge(out, tmp_path)
    merged = reload(tmp_path / "out")
    assert distance(logits(live), logits(merged)) <= CLOSE


@pytest.mark.parametrize("kind", ["nf4-double", "int8"])
@pytest.mark.parametrize("onto", ["original", "dequantized"])
def test_the_merged_model_can_be_packed_again(onto: str, kind: str, tmp_path: Path) -> None:
    base, recipe = save_base("llama", tmp_path / "base"), KINDS[kind]
    live = train(base, KINDS["nf4"], tmp_path / "adapter")
    assert merge(base, tmp_path, "dense", onto=onto)["drift_packed"] is None
    result = merge(base, tmp_path, onto=onto, quant=recipe.kind, double_quant=recipe.double)
    expected = quantize(tmp_path / "dense", tmp_path / "expected", recipe)
    for name, entry in open_index(expected).items():
        assert torch.equal(load(entry), load(open_index(tmp_path / "out")[name]))
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", "dense", "out", "expected"}
    again = load_model(str(tmp_path / "out"), dtype=torch.float32)
    assert len(packed_layers(again)) == 14
    assert result["drift_packed"] == pytest.approx(drift(live, dense_twin(again)), rel=1e-3)


def test_packed_files_are_packed_again(tmp_path: Path) -> None:
    out = quantize(save_base("llama", tmp_path / "base"), tmp_path / "packed", KINDS["nf4"])
    live = train(out, KINDS["nf4"], tmp_path / "adapter", stored=True)
    merge(out, tmp_path, quant="int8")
    again = load_model(str(tmp_path / "out"), dtype=torch.float32)
    assert {type(layer).__name__ for layer in packed_layers(again).values()} == {"Linear8bit"}
    assert distance(logits(live), logits(again)) < 0.05


def test_in_bf16_the_drift_is_one_rounding(tmp_path: Path) -> None:
    base = save_base("llama", tmp_path / "base", dtype=torch.bfloat16)
    live = train(base, KINDS["nf4"], tmp_path / "adapter", dtype=torch.bfloat16)
    result = merge(base, tmp_path)
    merged = reload(tmp_path / "out")
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert 1e-4 < result["drift"] < 2.0**-8
    assert result["drift"] == pytest.approx(drift(live, merged), rel=1e-3)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize(
    "lora",
    [
        LoRA(rank=2, alpha=4, targets=("q_proj", "embed_tokens")),
        LoRA(rank=2, alpha=4, targets=("q_proj",), trainable=("norm", "head")),
    ],
    ids=["table", "whole parts"],
)
def test_other_parts_are_merged_beside_the_packed_ones(lora: LoRA, kind: str, tmp_path: Path) -> None:
    base = save_base("llama-tied", tmp_path / "base")
    live = train(base, KINDS[kind], tmp_path / "adapter", lora=lora)
    merge(base, tmp_path)
    assert distance(logits(dense_twin(live)), logits(reload(tmp_path / "out"))) <= CLOSE


# --- refusals -----------------------------------------------------------------------------------------------------


def test_onto_what_is_not_there_is_refused(tmp_path: Path) -> None:
    base = save_base("llama", tmp_path / "base")
    out = quantize(base, tmp_path / "packed", KINDS["nf4"])
    train(out, KINDS["nf4"], tmp_path / "adapter", stored=True)
    with pytest.raises(ConfigError, match=r"--onto original: .*packed weights \(nf4\)(.|\n)*--model with"):
        merge(out, tmp_path, onto="original")
    train(base, None, tmp_path / "adapter")
    with pytest.raises(ConfigError, match="--onto dequantized: neither"):
        merge(base, tmp_path, onto="dequantized")
    assert not (tmp_path / "out").exists()


def test_stacks_that_the_files_hold_otherwise_are_refused(tmp_path: Path) -> None:
    """A square matrix would be merged the wrong way round, one expert more as if it were packed too."""
    name, recipe, dtype = "model.layers.0.mlp.experts.down_proj", KINDS["nf4"], torch.float32
    tensors = {f"model.layers.0.mlp.experts.{e}.down_proj.weight": values(8, 8, seed=e) for e in range(2)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    entries, drift = open_index(tmp_path), Drift()

    def edits(onto: Onto, *, transposed: bool) -> Collection[str]:
        stack = Stack((2, 8, 8), recipe, transposed=transposed, dtype=dtype, path=name)
        return experts_on_quantised(
            {}, {name: stack}, entries, recipe, onto=onto, dtype=dtype, prefix="model", drift=drift
        ).keys()

    assert edits("dequantized", transposed=False) == tensors.keys()
    assert not edits("original", transposed=True)
    with pytest.raises(ModelError, match=rf"no tensor {re.escape(name)}, which was packed(.|\n)*--onto original"):
        edits("dequantized", transposed=True)
    save_file({name: values(3, 8, 8)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    entries = open_index(tmp_path)
    with pytest.raises(QuantizationError, match=rf"^{re.escape(name)}: found \[3, 8, 8\], expected \[2, 8, 8\]"):
        edits("original", transposed=False)


def test_packed_layers_that_the_files_call_otherwise_are_refused(tmp_path: Path) -> None:
    """The dequantized weights would be written for some layers and not for others."""
    base = save_base("llama", tmp_path / "base")
    train(base, KINDS["nf4"], tmp_path / "adapter", lora=LoRA(rank=2, targets=("q_proj",)))
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.mlp.gate_up.weight"] = tensors.pop("model.layers.0.mlp.up_proj.weight")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"no tensor model\.layers\.0\.mlp\.up_proj\.weight(.|\n)*--onto original"):
        merge(base, tmp_path)
    assert merge(base, tmp_path, onto="original")["onto"] == "original"
