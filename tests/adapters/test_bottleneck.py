"""Bottleneck adapters: where they go in each family, what they compute, and that a run with them is exact."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from families import FAMILIES, distance, logits, perturb
from method_checks import CLOSE, EACH, base
from training_runs import cut_after, differences, run_sft, write_rows
from truetune.adapters import files
from truetune.adapters.inject import adapters, attach, trainable
from truetune.config.other_methods import Bottleneck
from truetune.errors import AdapterError
from virtual_checks import check, same_step, step

PLACEMENTS = ("houlsby", "pfeiffer", "parallel")
ENDS = {
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "bigcode": ("attn.c_proj", "mlp.c_proj"),
    "bloom": ("self_attention.dense", "mlp.dense_4h_to_h"),
    "neox": ("attention.dense", "mlp.dense_4h_to_h"),
    "opt": ("self_attn.out_proj", "fc2"),
    "phi": ("self_attn.dense", "mlp.fc2"),
    "qwen3": ("self_attn.o_proj", "mlp.down_proj"),
}


def settings(placement: str, **more: Any) -> Bottleneck:
    return Bottleneck(placement=placement, reduction=4.0, **more)


@pytest.mark.parametrize(("name", "form"), EACH)
def test_it_learns_is_read_back_and_generates_alike(name: str, form: str, tmp_path: Path) -> None:
    check(name, form, settings("pfeiffer"), tmp_path, lr=2e-2)


@pytest.mark.parametrize("placement", ["houlsby", "parallel"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bigcode", "bloom"])
def test_so_it_does_in_the_other_places(name: str, placement: str, tmp_path: Path) -> None:
    check(name, "float32", settings(placement, activation="gelu", adapter_scale=2.0), tmp_path, lr=2e-2)


@pytest.mark.parametrize("family", ENDS)
def test_it_goes_where_a_sublayer_ends(family: str) -> None:
    model = FAMILIES[family].make()
    before = logits(model)
    attach(model, settings("houlsby"))
    found = [path for path, _ in adapters(model)]
    assert sorted(re.split(r"\.\d+\.", path)[-1] for path in found) == sorted(ENDS[family] * 2)
    assert torch.equal(logits(model), before)
    assert sum(trainable(model).values()) == 4 * (2 * 8 * 32 + 8 + 32)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_it_computes_its_formula(placement: str) -> None:
    model = base("llama")
    attach(model, settings(placement, activation="silu", adapter_scale=0.5))
    perturb(model)
    layer = model.model.layers[0]
    adapter = layer.mlp if placement == "parallel" else layer.mlp.down_proj
    x = torch.randn(2, 3, 32 if placement == "parallel" else 48)
    with torch.no_grad():
        y = adapter.base(x)
        read = x if placement == "parallel" else y
        inner = torch.nn.functional.silu(read @ adapter.down.T + adapter.down_bias)
        expected = y + 0.5 * (inner @ adapter.up.T + adapter.up_bias)
        assert distance(adapter(x), expected) <= CLOSE


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_packed_and_recomputed_steps_are_the_same_step(placement: str) -> None:
    model = base("llama")
    attach(model, settings(placement))
    perturb(model)
    padded = step(model, packing=False)
    assert same_step(step(model, packing=True), padded)
    assert same_step(step(model, packing=True, recompute="full"), padded)


def test_an_mlp_that_is_no_module_is_refused_by_name() -> None:
    with pytest.raises(AdapterError, match=r"opt.*MLP"):
        attach(base("opt"), settings("parallel"))


def test_its_file_is_ours_by_name(tmp_path: Path) -> None:
    model = base("llama")
    attach(model, settings("houlsby", activation="gelu"))
    files.save(model, tmp_path, base=None)
    file = files.read(tmp_path)
    assert file.config["peft_type"] == "TRUETUNE_BOTTLENECK"
    assert file.settings == settings("houlsby", activation="gelu")


def test_a_resumed_run_is_the_run_to_the_bit(tiny_model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl")
    flags: dict[str, Any] = {"method": "bottleneck", "placement": "houlsby", "save_every": 1, "keep": 9}
    run_sft(tiny_model, data, tmp_path / "whole", **flags)
    out = cut_after(tmp_path / "whole", 3, tmp_path / "resumed")
    run_sft(tiny_model, data, out, resume="auto", **flags)
    assert differences(tmp_path / "whole", out) == []
