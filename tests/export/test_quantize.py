"""``truetune.quantize``: packed tensors beside dense ones, one at a time, and a config that says what they are."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig, PretrainedConfig

import truetune
from packed import KINDS, quantize, save_base
from reference.norms import distance
from truetune.checkpoint.tensors import load, open_index
from truetune.config.quant import QuantRecipe
from truetune.errors import ConfigError, ModelError, OutputError, QuantizationError
from truetune.export.quantize import quantize_checkpoint
from truetune.models.load import load_config, load_model, skeleton
from truetune.quant.replace import quantised


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base("llama", tmp_path / "base")


def held(folder: Path) -> dict[str, Tensor]:
    return {name: load(entry) for name, entry in open_index(folder).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_packed_weights_are_the_layers_own_and_the_rest_is_copied(kind: str, base: Path, tmp_path: Path) -> None:
    before, after = held(base), held(quantize(base, tmp_path / "out", KINDS[kind]))
    for name, tensor in before.items():
        path = name.removesuffix(".weight")
        if not path.endswith("_proj"):
            assert torch.equal(after.pop(name), tensor)
            continue
        plain = torch.nn.Linear(tensor.shape[1], tensor.shape[0], bias=False)
        plain.weight.data = tensor
        for part, expected in quantised(plain, KINDS[kind], path, dtype=torch.float32).packed().items():
            found = after.pop(f"{path}.{part}")
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
            assert torch.equal(found, expected)
    assert not after


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_and_error_are_reported(kind: str, base: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    model = skeleton(load_config(str(base)), dtype=torch.float32)
    report = quantize_checkpoint(
        base, tmp_path / "out", model, KINDS[kind], dtype=torch.float32, progress=lambda *now: seen.append(now)
    )
    assert (report.packed, report.dense) == (14, len(open_index(base)) - 14)
    assert report.bytes_before == sum(entry.nbytes for entry in open_index(base).values())
    assert report.nbytes == sum(entry.nbytes for entry in open_index(tmp_path / "out").values())
    assert seen[-1] == (report.nbytes, report.nbytes)
    names = [name for name in open_index(base) if name.endswith("_proj.weight")]
    live = load_model(str(tmp_path / "out"), dtype=torch.float32)
    dense = torch.cat([live.get_submodule(name.removesuffix(".weight")).dense().flatten() for name in names])
    exact = torch.cat([held(base)[name].flatten() for name in names])
    assert report.relative_error == pytest.approx(distance(dense, exact), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_config_says_what_transformers_asks(kind: str, base: Path, tmp_path: Path) -> None:
    recipe = QuantRecipe(kind=KINDS[kind].kind, double=KINDS[kind].double, skip=("layers.0.mlp",))
    out = quantize(base, tmp_path / "out", recipe, dtype=torch.bfloat16)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (base, out))
    settings = after.pop("quantization_config")
    assert after == before | {"dtype": "bfloat16"}
    assert settings["quant_method"] == "bitsandbytes"
    assert (settings["load_in_8bit"], settings["load_in_4bit"]) == (kind == "int8", kind != "int8")
    assert kind == "int8" or settings["bnb_4bit_quant_type"] == recipe.kind
    assert settings["bnb_4bit_use_double_quant"] == recipe.double
    assert settings["bnb_4bit_compute_dtype"] == "bfloat16"
    mlp = [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")]
    assert settings["llm_int8_skip_modules"] == [*mlp, "lm_head"]


def test_what_stays_dense_takes_the_dtype_that_is_asked_for(base: Path, tmp_path: Path) -> None:
    result = truetune.quantize(str(base), str(tmp_path / "out"), quant="nf4", dtype="bfloat16")
    tensors = held(tmp_path / "out")
    assert tensors["model.norm.weight"].dtype == torch.bfloat16
    assert tensors["model.layers.0.mlp.up_proj.weight.absmax"].dtype == torch.float32
    assert result["bytes"] < result["bytes_before"]
    assert load_config(str(tmp_path / "out")).dtype == torch.bfloat16


def test_shards_are_cut_anew(tmp_path: Path) -> None:
    base = save_base("llama", tmp_path / "base", shard="20KB")
    out = quantize(base, tmp_path / "out", KINDS["nf4"], max_shard_bytes=10_000)
    shards = list(out.glob("model-*.safetensors"))
    assert len(shards) > 2
    whole = held(quantize(base, tmp_path / "whole", KINDS["nf4"]))
    assert sorted(held(out)) == sorted(whole)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in held(out).items())


def test_other_files_come_along(base: Path, tmp_path: Path) -> None:
    (base / "tokenizer.json").write_text("{}")
    (base / "README.md").write_text("mine")
    out = quantize(base, tmp_path / "out", KINDS["nf4"])
    assert (out / "tokenizer.json").read_text() == "{}"
    assert not (out / "README.md").exists()


def test_weights_of_zeros_have_no_error(base: Path, tmp_path: Path) -> None:
    zeros = {name: tensor.zero_() for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(zeros, base / "model.safetensors", metadata={"format": "pt"})
    for kind in ("nf4-double", "int8"):
        result = truetune.quantize(
            str(base), str(tmp_path / kind), quant=KINDS[kind].kind, double_quant=KINDS[kind].double
        )
        assert result["relative_error"] == 0
        model = load_model(str(tmp_path / kind), dtype=torch.float32)
        assert not model.get_submodule("model.layers.0.mlp.up_proj").dense().any()


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_that_is_not_finite_is_named_and_nothing_is_left(kind: str, base: Path, tmp_path: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"][2, 2] = float("inf")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(QuantizationError, match=r"^model\.layers\.1\.self_attn\.o_proj: "):
        quantize(base, tmp_path / "out", KINDS[kind])
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_tensor_that_stays_dense_has_to_be_finite_too(base: Path, tmp_path: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors["model.embed_tokens.weight"][3, 1] = float("-inf")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(QuantizationError, match=r"^model\.embed_tokens\.weight: 1 of "):
        quantize(base, tmp_path / "out", KINDS["nf4"])
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


EXPERTS = 3
STACK = "model.layers.0.mlp.experts.down_proj"
MATRICES = QuantRecipe(kind="nf4", experts=True, skip=("gate_up_proj",))


def mixture(config: type[PretrainedConfig], folder: Path) -> Path:
    """One layer of experts whose second map is square: which way round a matrix lies can't be told by its shape."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_local_experts": EXPERTS}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 32}
    AutoModelForCausalLM.from_config(config(**sizes, **heads, pad_token_id=None)).save_pretrained(folder)
    return folder


def rewritten(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_matrices_one_by_one_are_not_taken_for_a_stack_that_is_transposed(tmp_path: Path) -> None:
    base = mixture(GptOssConfig, tmp_path / "base")

    def one_by_one(tensors: dict[str, Tensor]) -> None:
        for e, matrix in enumerate(tensors.pop(STACK)):
            tensors[f"model.layers.0.mlp.experts.{e}.down_proj.weight"] = matrix.T.contiguous()

    quantize(base, tmp_path / "whole", MATRICES)
    rewritten(base, one_by_one)
    with pytest.raises(ModelError, match=rf"no tensor {re.escape(STACK)}"):
        quantize(base, tmp_path / "out", MATRICES)


@pytest.mark.parametrize("count", [EXPERTS - 1, EXPERTS + 1])
def test_a_stack_of_another_number_of_experts_is_refused(count: int, tmp_path: Path) -> None:
    base = mixture(GptOssConfig, tmp_path / "base")
    rewritten(base, lambda tensors: tensors.update({STACK: torch.zeros(count, 16, 16)}))
    with pytest.raises(QuantizationError, match=rf"^{re.escape(STACK)}: found \[{count}, 16, 16\], expected \[3, 16"):
        quantize(base, tmp_path / "out", MATRICES)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_an_experts_parts_of_uneven_sizes_are_refused(tmp_path: Path) -> None:
    """As many rows as it should have, but the gate's would be taken for the other half's."""
    base, stem = mixture(MixtralConfig, tmp_path / "base"), "model.layers.0.block_sparse_moe.experts.1"
    assert f"{stem}.w1.weight" in open_index(base)
    recipe = QuantRecipe(kind="nf4", experts=True)
    quantize(base, tmp_path / "whole", recipe)
    uneven = {f"{stem}.w1.weight": torch.zeros(17, 16), f"{stem}.w3.weight": torch.zeros(15, 16)}
    rewritten(base, lambda tensors: tensors.update(uneven))
    with pytest.raises(
        QuantizationError, match=rf"^{re.escape(stem)}\.w1\.weight: found \[17, 16\], expected \[16, 16"
    ):
        quantize(base, tmp_path / "out", recipe)


def test_a_packed_base_is_refused(base: Path, tmp_path: Path) -> None:
    out = quantize(base, tmp_path / "out", KINDS["nf4"])
    with pytest.raises(ModelError, match=r"are quantised \(nf4\), and this needs dense ones(.|\n)*way out"):
        truetune.quantize(str(out), str(tmp_path / "again"), quant="int8")


def test_a_folder_in_use_and_unknown_settings_are_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is the base itself"):
        truetune.quantize(str(base), str(base), quant="nf4")
    quantize(base, tmp_path / "out", KINDS["nf4"])
    with pytest.raises(OutputError, match="already holds a model"):
        truetune.quantize(str(base), str(tmp_path / "out"), quant="nf4")
    with pytest.raises(QuantizationError, match=r"no layer to pack called 'up'(.|\n)*up_proj x2"):
        truetune.quantize(str(base), str(tmp_path / "new"), quant="nf4", quant_skip=("up",))
    settings: list[tuple[dict[str, Any], str]] = [
        ({}, "say what to quantise to"),
        ({"quant": "int8", "double_quant": True}, "--double-quant goes with"),
        ({"quant_skip": ("o_proj",)}, "--quant-skip goes with"),
    ]
    for given, message in settings:
        with pytest.raises(ConfigError, match=message):
            truetune.quantize(str(base), str(tmp_path / "new"), **given)
    assert not (tmp_path / "new").exists()


def test_weights_under_other_names_are_refused(base: Path, tmp_path: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.mlp.gate_up.weight"] = tensors.pop("model.layers.0.mlp.up_proj.weight")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"no tensor model\.layers\.0\.mlp\.up_proj\.weight(.|\n)*way out +--quant"):
        quantize(base, tmp_path / "out", KINDS["nf4"])
