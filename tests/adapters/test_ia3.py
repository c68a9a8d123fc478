"""(IA)³: what it scales, and that PEFT and we scale the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from families import FAMILIES, distance, logits, perturb
from method_checks import CLOSE, EACH, base, check, merged
from peft_peer import read_by_peft, saved_by_peft, theirs, trained_by
from step_models import rows
from truetune.adapters import files
from truetune.adapters.ia3 import IA3Linear
from truetune.adapters.inject import adapters, attach
from truetune.config.other_methods import IA3
from truetune.data.plan import StepPlan
from truetune.errors import AdapterError
from truetune.models.forward import Path as Way
from truetune.models.forward import prepared
from truetune.models.fused import Recompute
from truetune.models.survey import survey


@pytest.mark.parametrize(("name", "form"), EACH)
def test_it_learns_is_read_back_and_merges(name: str, form: str, tmp_path: Path) -> None:
    check(name, form, IA3(), tmp_path, lr=5e-2)


# --- the layer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scales_input", [False, True])
def test_the_layer_computes_its_formula(scales_input: bool) -> None:
    layer = IA3Linear(nn.Linear(6, 4), scales_input=scales_input)
    factors = nn.init.normal_(layer.factors).detach().flatten()
    x = torch.randn(3, 5, 6)
    weight, bias = layer.base.weight, layer.base.bias
    expected = (x * factors) @ weight.T + bias if scales_input else (x @ weight.T + bias) * factors
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("scales_input", [False, True])
def test_untrained_it_changes_no_bit_in_any_dtype(scales_input: bool) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        linear = nn.Linear(6, 4, dtype=dtype)
        x = torch.randn(3, 6, dtype=dtype)
        assert torch.equal(IA3Linear(linear, scales_input=scales_input)(x), linear(x))


def test_only_the_factors_learn() -> None:
    layer = IA3Linear(nn.Linear(6, 4), scales_input=False)
    layer(torch.randn(2, 6)).sum().backward()
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == {"factors"}
    assert layer.factors.dtype == torch.float32


def test_a_bias_that_is_trained_and_scaled_merges_as_both() -> None:
    model = base("gpt2")
    attach(model, IA3(trainable=("bias",)))
    perturb(model)
    assert distance(logits(merged("gpt2", "float32", model)), logits(model)) <= CLOSE


# --- PEFT ---------------------------------------------------------------------------------------------------------


def ours(family: str, settings: IA3) -> PreTrainedModel:
    model = FAMILIES[family].make()
    attach(model, settings)
    perturb(model)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_the_familys_layers_are_pefts_and_cross_both_ways(family: str, tmp_path: Path) -> None:
    live = ours(family, IA3())
    files.save(live, tmp_path / "ours", base=None)
    assert distance(logits(live), logits(read_by_peft(family, tmp_path / "ours"))) <= CLOSE
    assert distance(logits(live), logits(FAMILIES[family].make())) > 0.01
    foreign, read = theirs(family, peft.IA3Config(task_type="CAUSAL_LM")), FAMILIES[family].make()
    files.load(read, files.read(saved_by_peft(foreign, tmp_path / "theirs")))
    assert distance(logits(foreign), logits(read)) <= CLOSE
    assert trained_by(read) == trained_by(live) == trained_by(foreign)


SETTINGS = [
    IA3(targets=("q_proj", "down_proj"), feedforward=("down_proj",)),
    IA3(targets=("q_proj", "v_proj")),
    IA3(targets=("all-linear",), feedforward=(r".*layers\.1\.mlp\.down_proj",)),
    IA3(layers=(1,)),
    IA3(exclude=("v_proj",)),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=["named", "outputs", "one of a name", "layers", "exclude"])
def test_each_setting_crosses_to_peft_and_back(settings: IA3, tmp_path: Path) -> None:
    live, again = ours("llama", settings), FAMILIES["llama"].make()
    files.save(live, tmp_path, base=None)
    assert distance(logits(live), logits(read_by_peft("llama", tmp_path))) <= CLOSE
    files.load(again, files.read(tmp_path))
    assert torch.equal(logits(live), logits(again))


def test_an_expression_of_peft_is_read(tmp_path: Path) -> None:
    named = peft.IA3Config(target_modules=r".*\.(v|down)_proj", feedforward_modules=r".*down_proj")
    foreign, read = theirs("llama", named), FAMILIES["llama"].make()
    files.load(read, files.read(saved_by_peft(foreign, tmp_path)))
    assert distance(logits(foreign), logits(read)) <= CLOSE


# --- targets ------------------------------------------------------------------------------------------------------


def test_a_family_that_is_not_known_is_scaled_where_its_layers_are_called_as_usual() -> None:
    model = FAMILIES["llama"].make()
    model.config.model_type = "another"
    attach(model, IA3())
    found = {path.rsplit(".", 1)[-1]: layer.scales_input for path, layer in adapters(model)}  # type: ignore[union-attr]
    assert found == {"k_proj": False, "v_proj": False, "down_proj": True}


def test_an_unknown_family_has_to_be_named() -> None:
    model = FAMILIES["bloom"].make()
    model.config.model_type = "another"
    with pytest.raises(AdapterError, match=r"'another'(.|\n)*query_key_value(.|\n)*--feedforward DOWN"):
        attach(model, IA3())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (IA3(targets=("q_proj",), feedforward=("down_proj",)), "--feedforward: 'down_proj' is none of the targets"),
        (IA3(targets=("q_porj",)), "did you mean +q_proj"),
        (IA3(targets=("embed_tokens",)), "embed_tokens is of the kind Embedding, and ia3"),
    ],
)
def test_what_can_not_be_scaled_is_refused_by_name(settings: IA3, message: str) -> None:
    model = FAMILIES["llama"].make()
    with pytest.raises(AdapterError, match=message):
        attach(model, settings)
    assert [path for path, _ in adapters(model)] == []


def test_a_file_without_feedforward_modules_is_refused_by_the_field(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="feedforward_modules = None"):
        _ = files.AdapterFile(tmp_path, {"peft_type": "IA3", "target_modules": ["k_proj"]}, {}, {}).settings


# --- a layer of fused parts ---------------------------------------------------------------------------------------

FUSED = [
    (IA3(), {}),
    (IA3(), {"attention_bias": True, "mlp_bias": True}),
    (IA3(targets=("all-linear",), feedforward=("down_proj",)), {"mlp_bias": True}),
    (IA3(targets=("q_proj", "o_proj", "down_proj"), feedforward=(r".*layers\.1\.mlp\.down_proj",)), {}),
]


@pytest.mark.parametrize(("settings", "shape"), FUSED, ids=["usual", "biases", "all", "one of a name"])
@pytest.mark.parametrize("again", ["none", "cheap", "full"])
def test_a_fused_step_is_the_step_of_the_layers_themselves(
    settings: IA3, shape: dict[str, Any], again: Recompute
) -> None:
    model = FAMILIES["llama"].make(**shape)
    attach(model, settings)
    perturb(model)
    found = survey(model)
    assert len(found.fusable) == 2
    plan = StepPlan.build(rows(), batch_size=4, micro_tokens=200, packing=True, seed=0, epochs=1, max_steps=None)
    steps = []
    for fused in (True, False):
        way = Way(model, found, packing=True)
        with prepared(way, recompute=again, fused=fused):
            loss = torch.stack([way.loss(batch) for batch in plan.micro_batches(0)]).sum()
            loss.backward()  # type: ignore[no-untyped-call]
        steps.append((loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
        model.zero_grad(set_to_none=True)
    (one, gradients), (other, expected) = steps
    torch.testing.assert_close(one, other)
    assert gradients.keys() == expected.keys()
    assert len(gradients) == sum(p.requires_grad for p in model.parameters())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-4)
