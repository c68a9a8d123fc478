"""Which layers are packed, and that nothing else in a model changes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from families import FAMILIES, distance, logits
from packed import KINDS, dense_twin, packed_layers
from truetune.config.quant import QuantRecipe
from truetune.errors import QuantizationError
from truetune.models.load import load_model
from truetune.quant.linear4bit import Linear4bit
from truetune.quant.linear8bit import Linear8bit
from truetune.quant.replace import dense_stacks, linear_layers, quantisable, replace, stacks_remark


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_but_the_head_is_packed(family: str, kind: str) -> None:
    model = FAMILIES[family].make()
    linear = {path for path, _ in linear_layers(model)}
    head, table = model.get_output_embeddings(), model.get_input_embeddings().weight
    count = replace(model, KINDS[kind], dtype=torch.float32)
    packed = packed_layers(model)
    assert len(packed) == count > 0
    assert {type(layer) for layer in packed.values()} == {Linear8bit if kind == "int8" else Linear4bit}
    assert linear - packed.keys() == {path for path, module in model.named_modules() if module is head}
    assert (model.get_output_embeddings(), model.get_input_embeddings().weight) == (head, table)
    assert all(layer.path == path for path, layer in packed.items())
    assert distance(logits(dense_twin(model)), logits(model)) < (0.04 if kind == "int8" else 1e-5)


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        (("down_proj",), 2),
        (("down_proj", "o_proj"), 4),
        (("layers.1",), 7),
        (("layers.1.mlp",), 3),
        (("model.layers.0.self_attn.q_proj",), 1),
        (("lm_head",), 0),
    ],
)
def test_layers_are_skipped_by_whole_parts_of_their_names(skip: tuple[str, ...], left: int) -> None:
    model = FAMILIES["llama"].make()
    assert replace(model, QuantRecipe(kind="nf4", skip=skip), dtype=torch.float32) == 14 - left
    outside = [path for path, _ in linear_layers(model) if path != "lm_head"]
    assert len(outside) == left
    assert all(any(f".{name}." in f".{path}." for name in skip) for path in outside)


def test_a_name_that_no_layer_has_is_refused_with_what_there_is() -> None:
    model = FAMILIES["llama"].make()
    for name in ("down_prj", "proj", "norm", "layers.7"):
        with pytest.raises(QuantizationError, match=rf"--quant-skip: .*'{name}'(.|\n)*down_proj x2"):
            replace(model, QuantRecipe(kind="nf4", skip=("q_proj", name)), dtype=torch.float32)
    with pytest.raises(QuantizationError, match=r"did you mean +down_proj"):
        quantisable(model, QuantRecipe(kind="nf4", skip=("down_prj",)))
    assert not packed_layers(model)


def test_a_stored_skip_list_may_name_what_is_no_linear_layer() -> None:
    model = FAMILIES["llama"].make()
    stored = QuantRecipe(kind="nf4", skip=("lm_head", "norm", "vision_tower", "layers.0"), of_checkpoint=True)
    assert len(quantisable(model, stored)) == 7
    assert "lm_head" not in quantisable(model, QuantRecipe(kind="nf4", of_checkpoint=True))


def test_routers_and_classifiers_stay_as_they_are() -> None:
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    experts = {"num_experts": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    moe = Qwen2MoeForCausalLM(Qwen2MoeConfig(vocab_size=50, num_key_value_heads=2, **size, **experts))
    gate = "model.layers.0.mlp.shared_expert_gate"
    assert gate in dict(linear_layers(moe))
    assert gate not in quantisable(moe)
    assert "model.layers.0.mlp.shared_expert.up_proj" in quantisable(moe)
    bert = BertForSequenceClassification(BertConfig(vocab_size=50, **size))
    assert "classifier" not in quantisable(bert)
    assert "bert.encoder.layer.0.attention.self.query" in quantisable(bert)


def test_what_a_models_own_code_wants_wide_stays_wide() -> None:
    """T5 looks at the dtype of ``wo`` and casts its input to that: codes are no dtype to cast to."""
    config = T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    paths = quantisable(model)
    assert "encoder.block.0.layer.1.DenseReluDense.wi" in paths
    assert not any(path.endswith("wo") for path in paths)
    replace(model, KINDS["nf4"], dtype=torch.float32)
    ids = torch.arange(6)[None]
    ours, twin = (m(input_ids=ids, decoder_input_ids=ids).logits for m in (model, dense_twin(model)))
    assert distance(twin, ours) < 1e-5


def test_named_layers_alone_are_replaced_and_subclasses_never() -> None:
    class Own(nn.Linear):
        pass

    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": Own(8, 8), "c": nn.ModuleDict({"d": nn.Linear(8, 8)})})
    assert quantisable(model) == ["a", "c.d"]
    assert replace(model, KINDS["int8"], ["c.d"], dtype=torch.float32) == 1
    assert list(packed_layers(model)) == ["c.d"]


def test_a_skeleton_stays_one() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2, bias=False))
    replace(model, KINDS["nf4"], dtype=torch.bfloat16)
    assert all(p.is_meta for p in model.parameters())
    assert [layer.packed_bytes > 0 for layer in packed_layers(model).values()] == [True, True]


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_that_is_not_finite_is_named_by_its_path(kind: str) -> None:
    model = FAMILIES["llama"].make()
    model.get_submodule("model.layers.1.mlp.up_proj").weight.data[0, 0] = float("inf")
    with pytest.raises(QuantizationError, match=r"^model\.layers\.1\.mlp\.up_proj: "):
        replace(model, KINDS[kind], dtype=torch.float32)


def test_stacks_that_stay_dense_are_told(tmp_path: Path) -> None:
    """They are most of such a model."""
    model = Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, num_experts=3, moe_intermediate_size=16, shared_expert_intermediate_size=16,
        )
    )  # fmt: skip
    stacks = {f"model.layers.{i}.mlp.experts.{name}" for i in (0, 1) for name in ("gate_up_proj", "down_proj")}
    before = {path: model.get_parameter(path).clone() for path in stacks}
    assert dense_stacks(model) == {path: weight.nbytes for path, weight in before.items()}
    model.save_pretrained(tmp_path)
    said: list[str] = []
    recipe = dataclasses.replace(KINDS["nf4"], skip=("experts",), experts=True)
    loaded = load_model(str(tmp_path), dtype=torch.float32, quant=recipe, warn=said.append)
    assert packed_layers(loaded)
    assert all(torch.equal(loaded.get_parameter(path), weight) for path, weight in before.items())
    assert len(said) == 1
    assert "4 stacks of matrices (experts.gate_up_proj, experts.down_proj)" in said[0]
    assert said[0].startswith("0.0 MB")
    recipe = dataclasses.replace(KINDS["nf4"], skip=("gate_up_proj",), experts=True)
    loaded = load_model(str(tmp_path), dtype=torch.float32, quant=recipe, warn=said.append)
    assert set(dense_stacks(loaded)) == {path for path in stacks if path.endswith("gate_up_proj")}
    load_model(str(tmp_path), dtype=torch.float32, warn=said.append)
    load_model(str(tmp_path), dtype=torch.float32, quant=dataclasses.replace(recipe, skip=()), warn=said.append)
    assert len(said) == 2


def test_convolutions_are_no_stacks() -> None:
    assert stacks_remark(nn.Sequential(nn.Conv1d(2, 3, 4), nn.Linear(3, 3))) is None
