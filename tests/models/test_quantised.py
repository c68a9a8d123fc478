"""Loading packed: while the files are read, from files that are packed, and from what transformers saved."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Model, PreTrainedModel

import truetune
from families import FAMILIES, distance, logits, token_rows
from packed import KINDS, dense_twin, packed_layers, quantize, save_base
from truetune.config.quant import QuantRecipe
from truetune.errors import ConfigError, ModelError, QuantizationError, TruetuneError
from truetune.models.load import load_model
from truetune.quant.replace import replace

CLOSE = 1e-5
WIDE: dict[str, dict[str, Any]] = {  # rows of whole blocks: bitsandbytes' CPU kernels need them
    "llama": {"hidden_size": 64, "intermediate_size": 128},
    "llama-tied": {"hidden_size": 64, "intermediate_size": 128},
    "qwen3": {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16},
    "gpt2": {"n_embd": 64},
    "bigcode": {"n_embd": 64},
    "bloom": {"hidden_size": 64},
}


def load(folder: Path, **options: Any) -> PreTrainedModel:
    return load_model(str(folder), **{"dtype": torch.float32, **options})


def tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    return dict(model.state_dict())


def assert_same(one: PreTrainedModel, other: PreTrainedModel) -> None:
    """Bit for bit, under the same names."""
    ours, theirs = tensors(one), tensors(other)
    assert ours.keys() == theirs.keys()
    assert [n for n in ours if not torch.equal(ours[n], theirs[n]) or ours[n].dtype != theirs[n].dtype] == []
    assert torch.equal(logits(one), logits(other))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base("llama", tmp_path / "base")


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (config | fields).items() if v is not None}))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    held = load_file(folder / "model.safetensors")
    change(held)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})


# --- packed while they are read -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_on_the_way_and_packed_afterwards_are_the_same(family: str, kind: str, tmp_path: Path) -> None:
    base = save_base(family, tmp_path / "base")
    model, dense = load(base, quant=KINDS[kind]), load(base)
    replace(dense, KINDS[kind], dtype=torch.float32)
    assert len(packed_layers(model)) == len(packed_layers(dense)) > 0
    assert_same(model, dense)
    assert not model.training
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == model.config.tie_word_embeddings


@pytest.mark.parametrize(
    ("stored", "run"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")]
)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_packed_is_the_weight_in_the_dtype_of_the_run(kind: str, stored: str, run: str, tmp_path: Path) -> None:
    base = save_base("llama", tmp_path / "base", dtype=getattr(torch, stored))
    dtype = getattr(torch, run)
    model, dense = load(base, quant=KINDS[kind], dtype=dtype), load(base, dtype=dtype)
    replace(dense, KINDS[kind], dtype=dtype)
    assert_same(model, dense)
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {dtype}
    assert {layer.dtype for layer in packed_layers(model).values()} == {dtype}


def test_shards_are_read(base: Path, tmp_path: Path) -> None:
    shards = save_base("llama", tmp_path / "shards", shard="20KB")
    assert len(list(shards.glob("model-*.safetensors"))) > 2
    assert_same(load(shards, quant=KINDS["nf4"]), load(base, quant=KINDS["nf4"]))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_bare_body_is_read(kind: str, tmp_path: Path) -> None:
    """The published GPT-2's files lack the prefix ``transformer.``."""
    model = FAMILIES["gpt2"].make()
    body = GPT2Model(model.config)
    body.load_state_dict(model.transformer.state_dict())
    transformers.logging.disable_progress_bar()
    body.save_pretrained(tmp_path / "bare")
    whole = save_base("gpt2", tmp_path / "whole")
    assert_same(load(tmp_path / "bare", quant=KINDS[kind]), load(whole, quant=KINDS[kind]))
    stored = quantize(tmp_path / "bare", tmp_path / "out", KINDS[kind])
    assert_same(load(stored), load(whole, quant=KINDS[kind]))


def test_skipped_layers_are_read_as_they_are(base: Path) -> None:
    model, dense = load(base, quant=QuantRecipe(kind="nf4", skip=("down_proj", "layers.0"))), load(base)
    assert len(packed_layers(model)) == 6
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(model.get_parameter(name), dense.get_parameter(name))
    with pytest.raises(QuantizationError, match=r"--quant-skip: .*'down'"):
        load(base, quant=QuantRecipe(kind="nf4", skip=("down",)))


def test_dense_parts_can_be_written_to_and_the_file_stays(base: Path) -> None:
    """They are the file's own pages until somebody changes them."""
    before = (base / "model.safetensors").read_bytes()
    model = load(base, quant=KINDS["nf4"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert not model.get_input_embeddings().weight.any()
    assert (base / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("stored", [False, True], ids=["packed on the way", "packed afterwards"])
def test_what_is_written_to_one_model_is_written_to_no_other(stored: bool, base: Path, tmp_path: Path) -> None:
    """Both have the same file's pages, until one is trained or gets the trained parts of an adapter."""
    folder = quantize(base, tmp_path / "packed", KINDS["nf4"]) if stored else base
    quant = None if stored else KINDS["nf4"]
    one, other = load(folder, quant=quant), load(folder, quant=quant)
    before = logits(other)
    with torch.no_grad():
        for name, tensor in tensors(one).items():
            if tensor.is_floating_point() and "norm" in name:
                tensor.zero_()
    assert not torch.equal(logits(one), before)
    assert torch.equal(logits(other), before)
    assert torch.equal(logits(load(folder, quant=quant)), before)


def test_loading_leaves_the_process_as_it_was(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "0")
    verbosity = transformers.logging.get_verbosity()
    (base / "generation_config.json").write_text('{"eos_token_id": 7}')
    model = load(base, quant=KINDS["nf4"])
    assert os.environ["HF_DEACTIVATE_ASYNC_LOAD"] == "0"
    assert transformers.logging.get_verbosity() == verbosity
    assert type(model) is type(load(base))
    assert model.generation_config.eos_token_id == 7
    assert model.config.name_or_path == str(base)
    assert not hasattr(model.config, "quantization_config")
    monkeypatch.delenv("HF_DEACTIVATE_ASYNC_LOAD")
    load(base, quant=KINDS["nf4"])
    assert "HF_DEACTIVATE_ASYNC_LOAD" not in os.environ


def test_the_public_load_packs(base: Path) -> None:
    model = truetune.load(str(base), quant="nf4", double_quant=True, dtype="float32")
    assert_same(model, load(base, quant=KINDS["nf4-double"]))
    spared = truetune.load(str(base), quant="nf4", quant_skip=["down_proj"], dtype="float32")
    assert not any("down_proj" in path for path in packed_layers(spared))
    assert len(packed_layers(model)) > len(packed_layers(spared)) > 0
    with pytest.raises(ConfigError, match=r"--double-quant goes with"):
        truetune.load(str(base), quant="int8", double_quant=True)
    with pytest.raises(ConfigError, match="nf5"):
        truetune.load(str(base), quant="nf5")


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_that_is_not_finite_is_named(kind: str, base: Path) -> None:
    def spoil(held: dict[str, Tensor]) -> None:
        held["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")

    change_tensors(base, spoil)
    with pytest.raises(QuantizationError, match=r"^model\.layers\.1\.mlp\.up_proj: "):
        load(base, quant=KINDS[kind])


def test_a_missing_or_misshaped_weight_is_named(base: Path) -> None:
    change_tensors(base, lambda held: held.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ModelError, match=r"missing +model\.layers\.1\.mlp\.up_proj\.weight"):
        load(base, quant=KINDS["nf4"])

    def halve(held: dict[str, Tensor]) -> None:
        held["model.layers.1.mlp.up_proj.weight"] = torch.zeros(24, 32)

    change_tensors(base, halve)
    with pytest.raises(TruetuneError, match=r"model\.layers\.1\.mlp\.up_proj(.|\n)*\[24, 32\]"):
        load(base, quant=KINDS["nf4"])


# --- packed files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "bigcode", "bloom", "qwen3"])
def test_a_stored_model_is_the_live_one(family: str, kind: str, tmp_path: Path) -> None:
    base = save_base(family, tmp_path / "base")
    stored = load(quantize(base, tmp_path / "out", KINDS[kind]))
    assert_same(stored, load(base, quant=KINDS[kind]))
    assert not hasattr(stored.config, "quantization_config")
    layer = next(iter(packed_layers(stored).values()))
    before = layer.weight.clone()
    layer.weight = torch.nn.Parameter(torch.ones(layer.dense().T.shape if layer.transposed else layer.dense().shape))
    assert not torch.equal(layer.weight, before)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_stored_shards_are_read_in_another_dtype(kind: str, base: Path, tmp_path: Path) -> None:
    out = quantize(base, tmp_path / "out", KINDS[kind], max_shard_bytes=10_000)
    assert len(list(out.glob("model-*.safetensors"))) > 2
    model = load(out, dtype=torch.bfloat16)
    assert {layer.dtype for layer in packed_layers(model).values()} == {torch.bfloat16}
    assert distance(logits(load(out)), logits(model).float()) < 0.1


def test_quant_on_packed_files_is_refused(base: Path, tmp_path: Path) -> None:
    out = quantize(base, tmp_path / "out", KINDS["nf4"])
    for recipe in (KINDS["int8"], KINDS["nf4"]):
        with pytest.raises(
            ConfigError, match=rf"--quant {recipe.kind}: .*quantised already \(nf4\)(.|\n)*leave it out"
        ):
            load(out, quant=recipe)


def test_other_methods_are_refused_by_name(base: Path) -> None:
    for settings, name in (({"quant_method": "gptq", "bits": 4}, "gptq"), ({"bits": 4}, "unnamed")):
        change_config(base, quantization_config=settings)
        with pytest.raises(ModelError, match=rf"quantised \({name}, (.|\n)*int8, nf4, fp4"):
            load(base)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "af4"}, "bnb_4bit_quant_type 'af4'(.|\n)*nf4 or fp4"),
        ({"load_in_8bit": True, "llm_int8_has_fp16_weight": True}, "llm_int8_has_fp16_weight"),
        ({"load_in_8bit": True, "llm_int8_threshold": "six"}, "llm_int8_threshold 'six'(.|\n)*a number"),
        ({"load_in_4bit": True, "llm_int8_skip_modules": "lm_head"}, "llm_int8_skip_modules 'lm_head'(.|\n)*a list"),
        ({"quant_method": "truetune", "kind": "nf5"}, "kind 'nf5'(.|\n)*nf4 or fp4"),
        (
            {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
            r"_proj\.weight: packed as nf4, and config\.json says fp4",
        ),
        ({"load_in_8bit": True}, r"_proj\.weight: packed as nf4, and config\.json says int8"),
    ],
)
def test_a_config_that_says_something_else_is_refused(
    settings: dict[str, Any], message: str, base: Path, tmp_path: Path
) -> None:
    out = quantize(base, tmp_path / "out", KINDS["nf4"])
    change_config(out, quantization_config=settings)  # without quant_method, as old versions wrote it
    with pytest.raises(TruetuneError, match=message):
        load(out)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_config_that_says_nothing_is_refused(kind: str, base: Path, tmp_path: Path) -> None:
    out = quantize(base, tmp_path / "out", KINDS[kind])
    change_config(out, quantization_config=None)
    for recipe in (None, KINDS["nf4"]):
        with pytest.raises(ModelError, match=rf"holds packed weights(.|\n)*_proj\.weight, {kind}, and 13 more"):
            load(out, quant=recipe)


def test_a_config_of_packed_weights_over_dense_ones_is_refused(base: Path) -> None:
    change_config(base, quantization_config={"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})
    with pytest.raises(
        ModelError, match=r"says nf4, and its files hold no packed weight(.|\n)*remove quantization_config"
    ):
        load(base)


_STATE = "model.layers.0.self_attn.q_proj.weight.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("nf4", {"weight.absmax": None}, "not a whole 4-bit weight"),
        ("nf4-double", {"weight.nested_absmax": None}, "not a whole 4-bit weight(.|\n)*nested_absmax"),
        ("nf4-double", {"weight.nested_absmax": torch.ones(3)}, "3 scales of scales"),
        ("nf4-double", {"weight.nested_quant_map": torch.zeros(256)}, "other values"),
        ("nf4", {"weight.absmax": torch.ones(3)}, "3 scales"),
        ("nf4", {"weight.quant_state.bitsandbytes__nf4": None}, "codes without what they mean"),
        ("nf4", {"weight.quant_state.bitsandbytes__nf4": torch.zeros(4, dtype=torch.uint8)}, "no JSON"),
        ("nf4", {"weight.quant_map": torch.zeros(16)}, "other values"),
        ("int8", {"SCB": None}, "codes without what they mean(.|\n)*SCB"),
        ("int8", {"SCB": torch.ones(3)}, "3 scales"),
        ("int8", {"weight": torch.zeros(8, 8, dtype=torch.int8)}, r"\[8, 8\]"),
        ("int8", {"weight_format": torch.tensor(1, dtype=torch.uint8)}, "layout 1"),
    ],
)
def test_damaged_parts_are_refused_by_name(
    kind: str, change: dict[str, Tensor | None], message: str, base: Path, tmp_path: Path
) -> None:
    out = quantize(base, tmp_path / "out", KINDS[kind])

    def damage(held: dict[str, Tensor]) -> None:
        for part, tensor in change.items():
            name = f"model.layers.0.self_attn.q_proj.{part}"
            del held[name]
            held.update({} if tensor is None else {name: tensor})

    change_tensors(out, damage)
    with pytest.raises(QuantizationError, match=rf"^model\.layers\.0\.self_attn\.q_proj[^ ]*: (.|\n)*{message}"):
        load(out)


def test_packed_weights_without_a_layer_are_refused(base: Path, tmp_path: Path) -> None:
    out = quantize(base, tmp_path / "out", KINDS["nf4"])
    change_config(out, num_hidden_layers=1, layer_types=None)
    with pytest.raises(QuantizationError, match=r"7 packed weights belong to no linear layer(.|\n)*model\.layers\.1\."):
        load(out)


# --- transformers and bitsandbytes --------------------------------------------------------------------------------


@pytest.fixture
def bitsandbytes() -> Any:
    return pytest.importorskip("bitsandbytes")


def theirs(folder: Path, recipe: QuantRecipe | None = None, **options: Any) -> PreTrainedModel:
    """The model as transformers packs it, or as it reads packed files: nothing missing and nothing left over."""
    if recipe and recipe.kind == "int8":
        options["quantization_config"] = transformers.BitsAndBytesConfig(load_in_8bit=True)
    elif recipe:
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=recipe.kind, bnb_4bit_use_double_quant=recipe.double,
            bnb_4bit_compute_dtype=torch.float32,
        )  # fmt: skip
    transformers.logging.disable_progress_bar()
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map="cpu", attn_implementation="eager", output_loading_info=True, **options
    )
    assert {name: keys for name, keys in info.items() if keys} == {}
    return model


def their_logits(model: PreTrainedModel) -> Tensor:
    """In ``train`` mode: evaluating repacks bitsandbytes' weights on some CPUs; these models drop nothing."""
    with torch.no_grad():
        scores: Tensor = model.train()(input_ids=token_rows(), use_cache=False).logits
    return scores


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", WIDE)
def test_round_trips_with_transformers_and_bitsandbytes(
    family: str, kind: str, bitsandbytes: Any, tmp_path: Path
) -> None:
    """In training bitsandbytes multiplies with the dense weight, in 8 bits as well; so the dense twin is compared."""
    base = save_base(family, tmp_path / "base", **WIDE[family])
    foreign = theirs(base, KINDS[kind])
    foreign.save_pretrained(tmp_path / "theirs")
    ours = load(tmp_path / "theirs")
    assert len(packed_layers(ours)) > 0
    assert distance(their_logits(foreign), logits(dense_twin(ours))) < CLOSE
    out = quantize(base, tmp_path / "ours", KINDS[kind])
    read = theirs(out)
    assert {type(m).__module__.split(".")[0] for m in read.modules() if "bit" in type(m).__name__} == {"bitsandbytes"}
    assert distance(their_logits(read), logits(dense_twin(load(out)))) < CLOSE
    # Its CPU kernels round nested scales to 65,536 steps first, and know one of FP4's two zeros only.
    apart = {"nf4-double": 5e-3, "fp4": 1e-3}.get(kind, CLOSE)
    assert distance(logits(load(out)), logits(ours)) < apart


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_skip_lists_of_transformers_are_read(kind: str, bitsandbytes: Any, tmp_path: Path) -> None:
    """It takes beginnings and ends of paths, and expressions; what was packed is what the files say."""
    base = save_base("llama", tmp_path / "base", **WIDE["llama"])
    skip = ["lm_head", "model.layers.0", "down_proj"]
    kinds = {"load_in_8bit": True} if kind == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": kind}
    settings = transformers.BitsAndBytesConfig(llm_int8_skip_modules=skip, **kinds)
    theirs(base, quantization_config=settings).save_pretrained(tmp_path / "theirs")
    model = load(tmp_path / "theirs")
    assert len(packed_layers(model)) == 6
    dense = load(base)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(model.get_parameter(name), dense.get_parameter(name))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_our_skip_list_is_read_by_transformers(bitsandbytes: Any, tmp_path: Path) -> None:
    base = save_base("llama", tmp_path / "base", **WIDE["llama"])
    recipe = QuantRecipe(kind="nf4", skip=("layers.1.mlp", "o_proj"))
    out = quantize(base, tmp_path / "ours", recipe)
    read = theirs(out)
    assert sum("bit" in type(m).__name__ for m in read.modules()) == 14 - 5
    assert distance(their_logits(read), logits(load(out))) < CLOSE
    shutil.rmtree(base)
    assert distance(their_logits(theirs(out)), their_logits(read)) == 0
