"""Adapters cross between truetune and PEFT, both ways, with the same logits on every family.

All in float32 on tiny models whose logits have a spread of about 0.5; the two sum in another order, which was seen to
change them by up to 8e-7. A wrong scale, orientation or tensor changes them by 0.01 and more.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, GPTNeoConfig, PreTrainedModel

import truetune
from families import FAMILIES, SHARED, distance, logits, perturb
from truetune.adapters import files
from truetune.adapters.inject import adapters, attachment
from truetune.adapters.peft_config import from_peft
from truetune.config.lora import LoRA
from truetune.errors import AdapterError

CLOSE = 1e-5
LLAMAS = ("llama", "llama-tied")


@contextmanager
def peft_advice() -> Iterator[None]:
    """PEFT warns of what these tests do on purpose: Conv1D's orientation, adapters on one of two tied layers."""
    with warnings.catch_warnings():
        for text in ("fan_in_fan_out is set to", "Model has `tie_word_embeddings=True`", "You have requested `ensure"):
            warnings.filterwarnings("ignore", message=f".*{text}")
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*save_embedding_layers.*")
        warnings.filterwarnings("ignore", message=".*Found missing adapter keys", category=UserWarning)
        yield


def ours_to_peft(family: str, folder: Path, settings: LoRA) -> tuple[PreTrainedModel, Any]:
    """The same trained adapter: live here, and loaded from our file by PEFT."""
    live = FAMILIES[family].make()
    truetune.attach(live, settings, seed=3)
    perturb(live)
    truetune.save_adapter(live, str(folder))
    with peft_advice():
        return live, peft.PeftModel.from_pretrained(FAMILIES[family].make(), str(folder))


def peft_to_ours(family: str, folder: Path, **settings: Any) -> tuple[Any, PreTrainedModel]:
    """The same trained adapter: live in PEFT, and loaded from its file here."""
    settings = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "init_lora_weights": False} | settings
    with peft_advice(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        foreign = peft.get_peft_model(FAMILIES[family].make(), peft.LoraConfig(**settings))
        perturb(foreign)
        foreign.save_pretrained(str(folder))
    live = FAMILIES[family].make()
    truetune.load_adapter(live, str(folder))
    return foreign, live


def check(one: Any, other: Any, family: str) -> None:
    """Same logits, and not the base's."""
    assert distance(logits(one), logits(other)) <= CLOSE
    assert distance(logits(one), logits(FAMILIES[family].make())) > 0.01


# --- every family -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_reads_our_adapter(family: str, tmp_path: Path) -> None:
    settings = LoRA(rank=4, alpha=8, targets=FAMILIES[family].targets)
    check(*ours_to_peft(family, tmp_path, settings), family)


@pytest.mark.parametrize("family", FAMILIES)
def test_we_read_an_adapter_of_peft(family: str, tmp_path: Path) -> None:
    conv = {"fan_in_fan_out": family == "gpt2"}
    check(*peft_to_ours(family, tmp_path, target_modules=list(FAMILIES[family].targets), **conv), family)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_means_the_same_layers_to_both(family: str, tmp_path: Path) -> None:
    ours, theirs = ours_to_peft(family, tmp_path / "ours", LoRA(rank=2))
    check(ours, theirs, family)
    conv = {"fan_in_fan_out": family == "gpt2"}
    foreign, read = peft_to_ours(family, tmp_path / "theirs", target_modules="all-linear", **conv)
    check(foreign, read, family)
    paths = {path for path, _ in adapters(ours)}
    assert paths == {path for path, _ in adapters(read)}
    assert paths == {path for path, layer in theirs.base_model.model.named_modules() if hasattr(layer, "lora_A")}


# --- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True, "alpha": 3.5},
        {"dropout": 0.1},
        {"targets": (r"model\.layers\.1\..*_proj",)},
        {"targets": ("model.layers.0.self_attn.q_proj", "down_proj")},
        {"rank": 1},
    ],
    ids=["rslora", "dropout", "regex", "path", "rank 1"],
)
@pytest.mark.parametrize("family", ["llama"])
def test_peft_reads_each_of_our_settings(family: str, tmp_path: Path, settings: dict[str, Any]) -> None:
    check(*ours_to_peft(family, tmp_path, LoRA(**({"rank": 4, "targets": ("q_proj",)} | settings))), family)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True, "lora_alpha": 3},
        {"lora_dropout": 0.1},
        {"target_modules": r".*layers\.1.*\.(q|up)_proj"},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"target_modules": ["q_proj", "no_such_layer"]},
    ],
    ids=["rslora", "dropout", "regex", "gaussian", "orthogonal", "a name too many"],
)
def test_we_read_each_setting_of_peft(tmp_path: Path, settings: dict[str, Any]) -> None:
    check(*peft_to_ours("llama", tmp_path, **({"target_modules": ["q_proj", "v_proj"]} | settings)), "llama")


def test_an_adapter_goes_there_and_back_unchanged(tmp_path: Path) -> None:
    _, live = peft_to_ours("llama", tmp_path / "theirs", target_modules=["q_proj"], modules_to_save=["lm_head"])
    truetune.save_adapter(live, str(tmp_path / "ours"))
    before, after = files.read(tmp_path / "theirs"), files.read(tmp_path / "ours")
    assert before.tensors.keys() == after.tensors.keys()
    assert all(torch.equal(before.tensors[key], after.tensors[key]) for key in before.tensors)
    changed = {key for key, value in after.config.items() if before.config[key] not in (value, None)}
    assert changed <= {"init_lora_weights", "inference_mode", "base_model_name_or_path"}


# --- parts of the base trained in full ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "bloom", "opt", "phi", "qwen2"])
def test_trained_biases_cross_both_ways(family: str, tmp_path: Path) -> None:
    targets = FAMILIES[family].targets
    check(*ours_to_peft(family, tmp_path / "ours", LoRA(rank=2, targets=targets, trainable=("bias",))), family)
    conv = {"fan_in_fan_out": family == "gpt2"}
    check(*peft_to_ours(family, tmp_path / "theirs", target_modules=list(targets), bias="all", **conv), family)


@pytest.mark.parametrize("part", ["norm", "head", "embedding"])
@pytest.mark.parametrize("family", [*LLAMAS, "gpt2", "phi", "gemma2", "neox"])
def test_peft_reads_parts_trained_in_full(family: str, part: Any, tmp_path: Path) -> None:
    settings = LoRA(rank=2, targets=FAMILIES[family].targets[:1], trainable=(part,))
    ours, theirs = ours_to_peft(family, tmp_path, settings)
    check(ours, theirs, family)
    truetune.detach(ours)  # the part that was trained in full stays, and it is no longer the base's
    assert distance(logits(ours), logits(FAMILIES[family].make())) > 0.01


@pytest.mark.parametrize("names", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"], ["norm"], ["1.mlp"]])
@pytest.mark.parametrize("family", LLAMAS)
def test_we_read_parts_that_peft_trained_in_full(family: str, names: list[str], tmp_path: Path) -> None:
    """On a tied model PEFT trains copies, so that table and head part: we have to take them apart as well."""
    check(*peft_to_ours(family, tmp_path, target_modules=["q_proj"], modules_to_save=names), family)


@pytest.mark.parametrize("names", [["lm_head"], ["embed_tokens"]])
def test_we_read_a_tied_part_that_peft_kept_tied(names: list[str], tmp_path: Path) -> None:
    settings = {"target_modules": ["q_proj"], "modules_to_save": names, "ensure_weight_tying": True}
    foreign, live = peft_to_ours("llama-tied", tmp_path, **settings)
    check(foreign, live, "llama-tied")
    assert live.lm_head.weight is live.model.embed_tokens.weight


# --- adapters on the embedding and the head -----------------------------------------------------------------------


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma", "opt", "gpt2"])
def test_lora_on_the_embedding_or_the_head_crosses_to_peft(family: str, target: str, tmp_path: Path) -> None:
    name = FAMILIES[family].table if target == "embed_tokens" else target
    check(*ours_to_peft(family, tmp_path, LoRA(rank=4, targets=(name,))), family)


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
@pytest.mark.parametrize("tying", [False, True])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma"])
def test_lora_of_peft_on_the_embedding_or_the_head_is_read(
    family: str, targets: list[str], tying: bool, tmp_path: Path
) -> None:
    """Without ``ensure_weight_tying`` one of two tied layers changes and the other stays as it was."""
    if tying and not FAMILIES[family].make().config.tie_word_embeddings:
        pytest.skip("nothing is tied in this model")
    settings = {"target_modules": [*targets, "q_proj"], "ensure_weight_tying": tying}
    foreign, live = peft_to_ours(family, tmp_path, **settings)
    check(foreign, live, family)
    attached = attachment(live)
    assert attached is not None
    assert bool(attached.tied) == tying


def test_one_update_for_a_tied_matrix_trains_as_one() -> None:
    model = FAMILIES["llama-tied"].make()
    truetune.attach(model, LoRA(rank=4, targets=("embed_tokens",)))
    perturb(model)
    table, head = model.model.embed_tokens.merged_weight(), model.lm_head.merged_weight()
    assert torch.equal(table, head)
    assert {name.rsplit(".", 1)[-1] for name in truetune.trainable(model)} == {"lora_a", "lora_b"}


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_for_a_rewritten_base_is_refused(init: str, tmp_path: Path) -> None:
    """PEFT subtracts B A from the base when it loads one of these; on the base as it is, A and B mean nothing."""
    with pytest.raises(AdapterError, match=rf"init_lora_weights = '{init}'"):
        peft_to_ours("llama", tmp_path, target_modules=["q_proj"], init_lora_weights=init)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"bias": "lora_only"}, "bias"),
    ],
)
def test_a_setting_that_changes_the_meaning_is_refused_by_name(
    settings: dict[str, Any], field: str, tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match=rf"fields +{field} = "):
        peft_to_ours("llama", tmp_path, **({"target_modules": ["q_proj"]} | settings))


# --- real files ---------------------------------------------------------------------------------------------------

real = pytest.mark.skipif(not (SHARED / "adapters").is_dir(), reason="needs ../shared/adapters")


@real
def test_a_real_adapter_for_gpt_neo_fits_its_model() -> None:
    file = files.read(SHARED / "adapters" / "gpt-neo-125m-lora")
    assert (file.settings.rank, file.settings.alpha, sorted(file.settings.targets)) == (8, 16, ["q_proj", "v_proj"])
    shape = GPTNeoConfig(hidden_size=768, num_layers=12, num_heads=12, attention_types=[[["global", "local"], 6]])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape)
    files.load(model, file)
    assert len(list(adapters(model))) == 24


@real
def test_a_real_adapter_with_merged_lora_is_read_as_one_on_slices() -> None:
    file = files.read(SHARED / "adapters" / "bloom-560m-lora")
    assert file.config["enable_lora"] == [True, False, True]
    assert isinstance(file.settings, LoRA)
    assert file.settings.slices == ("query_key_value=1/3,3/3",)


@real
def test_every_config_of_pefts_benchmarks_is_read_or_refused_by_name() -> None:
    found = sorted((SHARED / "adapters" / "peft_configs").glob("**/adapter_config.json"))
    assert found
    unclear, read = [], 0
    for path in found:
        config = json.loads(path.read_text())
        try:
            settings = from_peft(config, path.parent)
        except AdapterError as error:
            named = [f"found {config['peft_type']}", *(f"{name} = " for name in config)]
            unclear += [] if any(name in str(error) for name in named) else [f"{path}: {error}"]
        else:
            read += 1
            if isinstance(settings, LoRA):
                assert (settings.rank, settings.alpha) == (config["r"], config["lora_alpha"])
    assert unclear == []
    assert read > 3
