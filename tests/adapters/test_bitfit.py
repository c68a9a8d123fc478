"""BitFit: the biases are trained, saved and merged, and nothing else is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from families import FAMILIES, distance, logits, perturb
from method_checks import BASES, check
from truetune.adapters import files
from truetune.adapters.inject import adapters, attach, detach, trainable
from truetune.config.other_methods import BitFit
from truetune.errors import AdapterError


@pytest.mark.parametrize("form", BASES)
@pytest.mark.parametrize("name", ["qwen2", "gpt2", "bigcode", "bloom"])
def test_it_learns_is_read_back_and_merges(name: str, form: str, tmp_path: Path) -> None:
    check(name, form, BitFit(), tmp_path, lr=2e-2)


@pytest.mark.parametrize("name", ["gpt2", "bloom", "opt", "phi", "qwen2", "neox"])
def test_just_the_biases_are_trained(name: str) -> None:
    model = FAMILIES[name].make()
    biases = {path: p.numel() for path, p in model.named_parameters() if path.endswith("bias")}
    attach(model, BitFit())
    assert trainable(model) == biases
    assert list(adapters(model)) == []


def test_the_file_holds_the_biases_under_their_names(tmp_path: Path) -> None:
    model = FAMILIES["gpt2"].make()
    attach(model, BitFit())
    perturb(model)
    files.save(model, tmp_path, base=None)
    assert set(load_file(tmp_path / files.WEIGHTS)) == {f"base_model.model.{name}" for name in trainable(model)}
    config = json.loads((tmp_path / files.CONFIG).read_text(encoding="utf-8"))
    assert (config["peft_type"], config["bias"]) == ("TRUETUNE_BITFIT", "all")
    assert files.read(tmp_path).settings == BitFit()


def test_norms_may_be_trained_as_well(tmp_path: Path) -> None:
    model, again = FAMILIES["gpt2"].make(), FAMILIES["gpt2"].make()
    attach(model, BitFit(trainable=("norm",)))
    perturb(model)
    files.save(model, tmp_path, base=None)
    files.load(again, files.read(tmp_path))
    assert distance(logits(model), logits(again)) == 0
    assert any("ln_f.weight" in name for name in trainable(model))


def test_a_model_without_biases_is_refused() -> None:
    model = FAMILIES["llama"].make()
    with pytest.raises(AdapterError, match=r"this model has none(.|\n)*--method ia3"):
        attach(model, BitFit())
    detach(model)
    assert sum(trainable(model).values()) == sum(p.numel() for p in model.parameters())


def test_an_adapter_for_biases_that_are_not_there_is_refused(tmp_path: Path) -> None:
    model = FAMILIES["gpt2"].make()
    attach(model, BitFit())
    files.save(model, tmp_path, base=None)
    with pytest.raises(AdapterError, match="this model has none"):
        files.load(FAMILIES["llama"].make(), files.read(tmp_path))
