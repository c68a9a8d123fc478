"""LLaMA-Adapter's second version: biases, scales and norms beside the prompts, learnt, kept and computed alike."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch

from families import FAMILIES, distance, logits, perturb
from method_checks import CLOSE, base
from truetune.adapters import files
from truetune.adapters.bank import Bank
from truetune.adapters.inject import adapters, attach, detach, trainable
from truetune.adapters.scaled_linear import ScaledLinear
from truetune.adapters.tensors import changes, to_file
from truetune.config.other_methods import LlamaAdapter
from truetune.errors import AdapterError
from virtual_checks import check, same_step, step

ONE = LlamaAdapter(adapter_length=3, adapter_layers=1, llama_adapter_v2=True)


@pytest.mark.parametrize(("name", "form"), [("llama", "float32"), ("gpt2", "int8"), ("llama", "nf4")])
def test_it_learns_is_read_back_and_generates_alike(name: str, form: str, tmp_path: Path) -> None:
    check(name, form, ONE, tmp_path, lr=0.05)


@pytest.mark.parametrize("family", FAMILIES)
def test_untrained_it_changes_nothing_and_goes_without_a_trace(family: str) -> None:
    model = FAMILIES[family].make()
    before, modules = logits(model), [path for path, _ in model.named_modules()]
    attach(model, ONE)
    assert distance(logits(model), before) <= 1e-6
    detach(model)
    assert [path for path, _ in model.named_modules()] == modules
    assert torch.equal(logits(model), before)


def test_every_linear_layer_and_norm_is_trained() -> None:
    model = FAMILIES["llama"].make()
    attach(model, ONE)
    outputs = sum(2 * (32 + 16 + 16 + 32 + 48 + 48 + 32) for _ in range(2))
    assert sum(trainable(model).values()) == 2 * outputs + 5 * 32 + 3 * 32 + 1 - outputs
    assert len([1 for _, layer in adapters(model) if isinstance(layer, ScaledLinear)]) == 7 + 3


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_it_computes_its_formula(family: str) -> None:
    """With no gate open it is the base with s W and s (bias + b) in place of W and its bias."""
    model, twin = FAMILIES[family].make(), FAMILIES[family].make()
    attach(model, ONE)
    perturb(model)
    named = dict(twin.named_modules())
    with torch.no_grad():
        for path, layer in adapters(model):
            if not isinstance(layer, ScaledLinear):
                layer.gate.zero_()
            scales = {path: layer.behind} if isinstance(layer, ScaledLinear) else {}
            scales |= {f"{path}.{name}": one for name, one in getattr(layer, "_behind", dict)().items()}
            for name, one in scales.items():
                linear = named[name]
                bias = 0 if linear.bias is None else linear.bias
                linear.weight.mul_(one.factor[:, None])
                linear.bias = torch.nn.Parameter((bias + one.shift) * one.factor)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                twin.get_parameter(name.replace(".base.", ".")).copy_(parameter)
    assert distance(logits(model), logits(twin)) <= CLOSE


def test_the_end_of_an_attention_is_counted_once() -> None:
    """O'(a + more) - O'(a) is what the prompts add, whatever the trained bias."""
    model = FAMILIES["llama"].make()
    attach(model, ONE)
    attention = next(layer for _, layer in adapters(model) if not isinstance(layer, ScaledLinear))
    perturb(model)
    mixed = torch.randn(1, 2, 32)
    with torch.no_grad(), attention._scaled():
        linear = attention.base.o_proj
        assert distance(attention._end(mixed), linear(mixed) - linear(torch.zeros_like(mixed))) <= CLOSE


def test_packed_and_recomputed_steps_are_the_same_step() -> None:
    model = base("llama")
    attach(model, ONE)
    perturb(model)
    padded = step(model, packing=False)
    assert same_step(step(model, packing=True), padded)
    assert same_step(step(model, packing=True, recompute="full"), padded)


def test_its_file_says_what_it_is_and_peft_refuses_it(tmp_path: Path) -> None:
    model = FAMILIES["llama"].make()
    attach(model, ONE)
    perturb(model)
    files.save(model, tmp_path, base=None)
    config = json.loads((tmp_path / files.CONFIG).read_text(encoding="utf-8"))
    assert config["peft_type"] == "TRUETUNE_LLAMA_ADAPTER"
    assert files.read(tmp_path).settings == ONE
    with pytest.raises(Exception, match="TRUETUNE_LLAMA_ADAPTER"):
        peft.PeftModel.from_pretrained(FAMILIES["llama"].make(), str(tmp_path))
    with pytest.raises(AdapterError, match=r"does not fold|do not fold"):
        changes(model, to_file(model))


def test_beside_others_by_name_it_comes_and_goes(tmp_path: Path) -> None:
    model, other = FAMILIES["llama"].make(), FAMILIES["llama"].make()
    attach(model, ONE)
    perturb(model)
    files.save(model, tmp_path, base=None)
    before = logits(other)
    bank = Bank(other)
    bank.add("one", files.read(tmp_path))
    bank.use("one")
    assert torch.equal(logits(other), logits(model))
    bank.use(None)
    assert torch.equal(logits(other), before)
