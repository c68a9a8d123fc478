"""``truetune merge`` of several adapters: into a base, and into one adapter that PEFT reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import truetune as tt
from families import FAMILIES, distance, logits, perturb
from packed import save_base
from peft_peer import read_by_peft
from truetune.adapters import files
from truetune.adapters.inject import attach
from truetune.config.adapter import AdapterConfig
from truetune.errors import AdapterError, ConfigError, OutputError
from truetune.models.load import weight_hash

CLOSE = 1e-5
WEIGHTS = {"one": 0.7, "two": -0.4}


def write(origin: Path, folder: Path, config: AdapterConfig, *, seed: int, **card: Any) -> Path:
    model = AutoModelForCausalLM.from_pretrained(origin)
    attach(model, config)
    perturb(model, seed=seed)
    content = {"format": 1, "base": {"name": str(origin), "weights_sha256": weight_hash(origin)}, **card}
    files.save(model, folder, base=str(origin), card=content)
    return folder


def two(family: str, tmp_path: Path, *configs: AdapterConfig) -> tuple[Path, list[str]]:
    """A base, and two adapters with their weights as the command line has them."""
    base = save_base(family, tmp_path / "base")
    default = (tt.LoRA(rank=3, alpha=6), tt.LoRA(rank=2, alpha=8, targets=FAMILIES[family].targets[:1]))
    for seed, (name, config) in enumerate(zip(WEIGHTS, configs or default, strict=True)):
        write(base, tmp_path / name, config, seed=seed)
    return base, [f"{tmp_path / name}={weight}" for name, weight in WEIGHTS.items()]


def live(base: Path, given: list[str]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base)
    paths = [text.rpartition("=")[0] for text in given]
    for path in paths:
        tt.load_adapter(model, path, name=path)
    tt.set_adapter(model, paths, weights=list(WEIGHTS.values()))
    return logits(model)


@pytest.mark.parametrize("family", ["llama", "gpt2", "llama-tied"])
def test_a_model_of_two_answers_as_their_sum(family: str, tmp_path: Path) -> None:
    base, given = two(family, tmp_path)
    report = tt.merge(str(base), given, str(tmp_path / "merged"))
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert distance(merged, live(base, given)) <= CLOSE
    assert distance(merged, logits(AutoModelForCausalLM.from_pretrained(base))) > 1e-3
    assert report["changed"] == len(tt.attach(AutoModelForCausalLM.from_pretrained(base), tt.LoRA()).sites)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_written_adapter_is_the_sum_to_us_and_to_peft(family: str, tmp_path: Path) -> None:
    base, given = two(family, tmp_path)
    report = tt.merge(None, given, str(tmp_path / "sum"), to="adapter")
    model = AutoModelForCausalLM.from_pretrained(base)
    files.load(model, files.read(tmp_path / "sum"))
    assert distance(logits(model), live(base, given)) <= CLOSE
    assert distance(logits(read_by_peft(family, tmp_path / "sum")), live(base, given)) <= CLOSE
    assert report["ranks"] == [3, 5]
    card = files.read(tmp_path / "sum").card
    parents = [(p["folder"], p["weight"], p["method"]) for p in card["combination"]["parents"]]
    assert parents == [(str(tmp_path / name), weight, "lora") for name, weight in WEIGHTS.items()]
    assert card["base"]["weights_sha256"] == weight_hash(base)


@pytest.mark.parametrize(
    "pair", [(tt.AdaLoRA(rank=3, target_rank=2), tt.LoRA(rank=2)), (tt.VeRA(rank=6), tt.LoRA(lora_bias=True))]
)
def test_methods_of_the_low_rank_family_add_up(pair: tuple[AdapterConfig, AdapterConfig], tmp_path: Path) -> None:
    base, given = two("gpt2", tmp_path, *pair)
    tt.merge(str(base), given, str(tmp_path / "merged"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert distance(logits(merged), live(base, given)) <= CLOSE


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (tt.DoRA(rank=2), "two lengths have no sum"),
        (tt.IA3(), "multiplies"),
        (tt.Prompt(virtual_tokens=2), "does not fold into weights"),
        (tt.Bottleneck(reduction=4.0), "does not fold into weights"),
        (tt.LoRA(rank=2, trainable=("norm",)), "trained in full"),
    ],
)
def test_what_has_no_sum_is_refused_with_the_reason(other: AdapterConfig, reason: str, tmp_path: Path) -> None:
    base, given = two("llama", tmp_path, tt.LoRA(rank=2), other)
    for settings in ({}, {"to": "adapter"}):
        with pytest.raises(AdapterError, match=rf"two(.|\n)*{reason}"):
            tt.merge(str(base), given, str(tmp_path / "out"), **settings)
    assert not (tmp_path / "out").exists()


def test_svd_takes_a_rank_and_is_near_the_sum(tmp_path: Path) -> None:
    base, given = two("llama", tmp_path)
    tt.merge(str(base), given, str(tmp_path / "exact"), to="adapter", combine="svd", rank=5)
    tt.merge(str(base), given, str(tmp_path / "small"), to="adapter", combine="svd", rank=1)
    found = []
    for name in ("exact", "small"):
        model = AutoModelForCausalLM.from_pretrained(base)
        files.load(model, files.read(tmp_path / name))
        found.append(distance(logits(model), live(base, given)))
    assert found[0] <= 10 * CLOSE < found[1]
    held = load_file(tmp_path / "small" / files.WEIGHTS)
    assert {len(t) for key, t in held.items() if "lora_A" in key} == {1}


def test_one_adapter_may_have_a_weight_too(tmp_path: Path) -> None:
    base, given = two("llama", tmp_path)
    tt.merge(str(base), given[:1], str(tmp_path / "merged"))
    model = AutoModelForCausalLM.from_pretrained(base)
    tt.load_adapter(model, str(tmp_path / "one"))
    tt.set_adapter(model, ["default"], weights=[0.7])
    assert distance(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(model)) <= CLOSE


def test_adapters_of_two_bases_are_refused(tmp_path: Path) -> None:
    base, given = two("llama", tmp_path)
    write(base, tmp_path / "two", tt.LoRA(rank=2), seed=1, base={"name": "elsewhere", "weights_sha256": "0" * 64})
    with pytest.raises(AdapterError, match=r"another base than(.|\n)*--allow-mismatch base"):
        tt.merge(None, given, str(tmp_path / "out"), to="adapter")
    tt.merge(None, given, str(tmp_path / "out"), to="adapter", allow_mismatch="base")


def test_templates_that_differ_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, given = two("llama", tmp_path)
    for name, stop in (("one", 3), ("two", 4)):
        template = {"name": name, "source": name, "sha256": name}
        write(base, tmp_path / name, tt.LoRA(rank=2), seed=1, template=template, stop_ids=[stop])
    tt.merge(None, given, str(tmp_path / "out"), to="adapter")
    assert "different templates" in capsys.readouterr().err
    card = json.loads((tmp_path / "out" / files.CARD).read_text())
    assert (card["template"]["name"], card["stop_ids"]) == ("one", [3, 4])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"adapter": ["a", "a=0.5"]}, "given twice"),
        ({"adapter": ["a=inf"]}, "finite weight"),
        ({"adapter": [""]}, "name is empty"),
        ({"to": "adapter", "quant": "nf4"}, "writes none"),
        ({"rank": 3}, "svd takes one"),
        ({"density": 0.5}, "keeps every entry"),
        ({"seed": 3}, "draws nothing"),
        ({"combine": "ties", "density": 0.0}, "--density"),
        ({"combine": "tise"}, "did you mean"),
        ({"adapter": ["a", "b"], "to": "adapter", "verify": True}, "--verify"),
    ],
)
def test_settings_that_make_no_sense_together_are_refused(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    given = {"adapter": ["a"], **settings}
    with pytest.raises(ConfigError, match=said):
        tt.merge("base", given.pop("adapter"), str(tmp_path / "out"), **given)


def test_without_a_base_the_one_that_adapters_name_is_taken_or_asked_for(tmp_path: Path) -> None:
    base, given = two("llama", tmp_path)
    with pytest.raises(ConfigError, match="--model is missing"):
        tt.merge(None, given, str(tmp_path / "out"))
    base.rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match=r"it is not there(.|\n)*--model"):
        tt.merge(None, given, str(tmp_path / "out"), to="adapter")
    tt.merge(str(tmp_path / "moved"), given, str(tmp_path / "out"), to="adapter")
    with pytest.raises(OutputError, match="not empty"):
        tt.merge(str(tmp_path / "moved"), given, str(tmp_path / "out"), to="adapter")
