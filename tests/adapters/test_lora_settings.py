"""LoRA's settings by layer, PEFT's way: patterns of ranks and alphas, exclusions, layer numbers, a bias beside B."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import truetune
from families import FAMILIES, distance, logits, perturb
from method_checks import CLOSE
from peft_peer import read_by_peft, saved_by_peft, theirs, trained_by
from truetune.adapters import files
from truetune.adapters.inject import adapters, attach
from truetune.adapters.lora_patterns import patterns_of
from truetune.config.lora import LoRA
from truetune.errors import AdapterError, ConfigError

OURS: dict[str, dict[str, Any]] = {
    "ranks": {"rank_pattern": ("q_proj=2", "model.layers.1.mlp.down_proj=8")},
    "alphas": {"alpha_pattern": ("v_proj=3.5", "layers.1.*=16")},
    "both, rslora": {"rank_pattern": ("q_proj=2",), "alpha_pattern": ("q_proj=3",), "use_rslora": True},
    "the first of two": {"rank_pattern": ("q_proj=2", r"layers\.1\..*=3")},
    "exclude": {"targets": ("all-linear",), "exclude": ("k_proj", r".*\.1\.mlp\..*")},
    "layers": {"layers": (1,)},
    "nearly all others": {"rank_pattern": (".*_proj=3", "no=7"), "rank": 5, "expected": "--rank-pattern: 'no'"},
}
THEIRS: dict[str, dict[str, Any]] = {
    "ranks": {"rank_pattern": {"q_proj": 2, "model.layers.1.mlp.down_proj": 8}},
    "alphas": {"alpha_pattern": {"v_proj": 3.5, "layers.1.*down_proj": 16}},
    "both, rslora": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}, "use_rslora": True},
    "exclude": {"target_modules": "all-linear", "exclude_modules": ["k_proj"]},
    "exclude by an expression": {"target_modules": "all-linear", "exclude_modules": r".*\.1\.mlp\..*"},
    "layers": {"layers_to_transform": [1]},
    "one layer": {"layers_to_transform": 0},
    "a pattern of nothing": {"rank_pattern": {"no_such": 2}},
}
TARGETS = ("q_proj", "v_proj", "down_proj")


@pytest.mark.parametrize("kind", OURS)
def test_peft_reads_each_of_ours(kind: str, tmp_path: Path) -> None:
    settings = {"rank": 4, "alpha": 8, "targets": TARGETS, **OURS[kind]}
    expected, live = settings.pop("expected", None), FAMILIES["llama"].make()
    if expected:
        with pytest.raises(AdapterError, match=expected):
            attach(live, LoRA(**settings))
        return
    attach(live, LoRA(**settings), seed=3)
    perturb(live)
    truetune.save_adapter(live, str(tmp_path))
    foreign = read_by_peft("llama", tmp_path)
    assert distance(logits(live), logits(foreign)) <= CLOSE
    assert distance(logits(live), logits(FAMILIES["llama"].make())) > 0.01
    again = FAMILIES["llama"].make()
    truetune.load_adapter(again, str(tmp_path))
    assert torch.equal(logits(again), logits(live))


@pytest.mark.parametrize("kind", THEIRS)
def test_we_read_each_of_pefts(kind: str, tmp_path: Path) -> None:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": list(TARGETS), "task_type": "CAUSAL_LM", **THEIRS[kind]}
    foreign = theirs("llama", peft.LoraConfig(**settings))
    live = FAMILIES["llama"].make()
    truetune.load_adapter(live, str(saved_by_peft(foreign, tmp_path)))
    assert distance(logits(live), logits(foreign)) <= CLOSE
    assert sum(truetune.trainable(live).values()) == trained_by(foreign)


@pytest.mark.parametrize("family", ["gpt2", "bloom", "phi"])
def test_a_bias_beside_b_crosses_both_ways_and_merges(family: str, tmp_path: Path) -> None:
    targets = FAMILIES[family].targets
    live = FAMILIES[family].make()
    attach(live, LoRA(rank=4, alpha=8, lora_bias=True, targets=targets))
    perturb(live)
    truetune.save_adapter(live, str(tmp_path / "ours"))
    expected = logits(live)
    assert distance(expected, logits(read_by_peft(family, tmp_path / "ours"))) <= CLOSE
    for _, layer in adapters(live):
        layer.merge()  # type: ignore[operator]
    assert distance(logits(live), expected) <= CLOSE

    settings: dict[str, Any] = {"r": 4, "lora_bias": True, "task_type": "CAUSAL_LM", "target_modules": list(targets)}
    foreign = theirs(family, peft.LoraConfig(**settings, fan_in_fan_out=family == "gpt2"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LoRA tensor.s. have invalid shape")  # biases have one dimension
        saved_by_peft(foreign, tmp_path / "theirs")
    again = FAMILIES[family].make()
    truetune.load_adapter(again, str(tmp_path / "theirs"))
    assert distance(logits(again), logits(foreign)) <= CLOSE
    assert sum(truetune.trainable(again).values()) == trained_by(foreign)


def test_a_bias_that_has_nowhere_to_go_is_not_merged() -> None:
    live = FAMILIES["llama"].make()
    attach(live, LoRA(rank=4, lora_bias=True))
    (_, layer), *_ = adapters(live)
    with pytest.raises(AdapterError, match="this layer of the base has none"):
        layer.merge()  # type: ignore[operator]


def test_a_table_has_no_bias_beside_b() -> None:
    with pytest.raises(AdapterError, match=r"--lora-bias(.|\n)*leave it out of --targets"):
        attach(FAMILIES["llama"].make(), LoRA(lora_bias=True, targets=("embed_tokens",)))


@pytest.mark.parametrize("kind", ["ranks", "both, rslora"])
def test_patterns_are_written_as_they_were_given(kind: str) -> None:
    live = FAMILIES["llama"].make()
    settings = LoRA(rank=4, alpha=8, targets=TARGETS, **OURS[kind])
    sites = attach(live, settings).sites
    found = patterns_of(settings, {path: live.get_submodule(path) for path in sites})
    assert (found["r"], found["lora_alpha"]) == (4, 8)
    assert (found["rank_pattern"], found["alpha_pattern"]) == (settings.ranks, settings.alphas)


def test_a_file_sorts_names_so_where_their_order_counts_they_are_told_apart(tmp_path: Path) -> None:
    live = FAMILIES["llama"].make()
    attach(live, LoRA(rank=4, targets=TARGETS, **OURS["the first of two"]))
    files.save(live, tmp_path, base=None)
    found = files.read(tmp_path).settings
    assert isinstance(found, LoRA)
    assert list(found.ranks) == sorted(found.ranks)
    assert {layer.rank for path, layer in adapters(live) if path.endswith("1.self_attn.q_proj")} == {2}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank_pattern": ("q_porj=2",)}, r"'q_porj' is none of the layers(.|\n)*did you mean +q_proj"),
        ({"alpha_pattern": ("o_proj=2",)}, r"'o_proj' is none of the layers"),
        ({"rank_pattern": ("q_(proj=2",)}, r"'q_\(proj' is no valid regular expression"),
        ({"exclude": ("nope",)}, r"--exclude: the model has no layer called 'nope'"),
        ({"layers": (7,)}, r"--layers 7: the model has no such decoder layer"),
    ],
)
def test_a_name_of_nothing_is_an_error(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        attach(FAMILIES["llama"].make(), LoRA(targets=TARGETS, **settings))


@pytest.mark.parametrize("value", ["q_proj", "q_proj=", "=3", "q_proj=0", "q_proj=-1", "q_proj=2.5", "q_proj=two"])
def test_a_rank_is_a_whole_number(value: str) -> None:
    with pytest.raises(
        ConfigError, match=r"--rank-pattern: found .*, expected NAME=NUMBER with a whole number above 0"
    ):
        LoRA(rank_pattern=(value,))
