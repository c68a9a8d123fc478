"""``--max-memory``: what a run does to keep to it, and what it is told where it can't."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from memory_pages import on_linux
from training_runs import differences, run_sft, same_tensors, write_rows
from truetune.checkpoint.header import PlannedTensor, header_bytes
from truetune.config.sft import SFTConfig
from truetune.errors import ConfigError, ModelError
from truetune.models import load
from truetune.recipes import memory_plan

LAYERS = 16
LARGE = {"vocab_size": 300, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": LAYERS,
         "num_attention_heads": 16, "num_key_value_heads": 16, "tie_word_embeddings": False}  # fmt: skip
# Gigabytes stand against what the process itself takes, which wavers by some MB from call to call.
PLAN = {"dtype": "bfloat16", "dry_run": True, "batch_size": 14, "micro_tokens": 4096}
Planned = Callable[..., dict[str, Any]]


def write_sparse(folder: Path, tokens_from: Path) -> Path:
    """A checkpoint of 2 GB that takes no room: headers, and holes for bodies."""
    shutil.copytree(tokens_from, folder)
    config = LlamaConfig(**LARGE, dtype="bfloat16", bos_token_id=None, eos_token_id=256, pad_token_id=None)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(str(folder))
    skeleton = load.skeleton(config, dtype=torch.bfloat16)
    plan = [PlannedTensor(name, torch.bfloat16, tuple(p.shape)) for name, p in skeleton.named_parameters()]
    header = header_bytes(plan)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(tensor.nbytes for tensor in plan))
    return folder


@pytest.fixture(scope="module")
def large(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sparse(tmp_path_factory.mktemp("large") / "large", tiny_model)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")


@pytest.fixture
def planned(large: Path, data: Path, tmp_path: Path) -> Planned:
    """``planned(**flags)``: what a dry run says."""
    return lambda **flags: run_sft(large, data, tmp_path / "out", **{**PLAN, **flags})


def decided(plan: dict[str, Any]) -> tuple[str, int, bool]:
    return plan["recompute"], plan["full_layers"], plan["streamed"]


def peak(plan: dict[str, Any]) -> float:
    found: float = plan["memory_mb"]["peak"]
    return found


@on_linux
def test_a_plan_gives_up_as_little_as_it_must(planned: Planned) -> None:
    """The less may be taken, the more layers are computed again; when that is not enough, the base stays on disk."""
    free = planned()
    assert decided(free) == ("cheap", 0, False)
    kept, weights = free["memory_mb"]["activations"], free["memory_mb"]["weights"]
    assert (kept > 400, weights > 2000) == (True, True)
    found = [
        planned(max_memory=f"{peak(free) - less:.0f}MB") for less in (-100, kept / 4, kept / 2, kept + weights / 2)
    ]
    layers = [plan["full_layers"] for plan in found]
    assert [plan["streamed"] for plan in found] == [False, False, False, True]
    assert layers[0] == 0 < layers[1] < layers[2] < LAYERS
    assert layers[3] == 0  # there is room enough without the base
    assert all(peak(plan) <= float(peak(free) - less) for plan, less in zip(found, (-100, kept / 4), strict=False))
    assert found[3]["memory_mb"]["weights"] < weights / 5


def test_beside_a_packed_base_at_most_a_gigabyte_of_activations_is_kept(planned: Planned) -> None:
    """Who packs the base has come for memory; who keeps it dense, or asks for something else, gets what was asked."""
    many = {"batch_size": 64}
    dense, packed, few = planned(**many), planned(quant="nf4", **many), planned(quant="nf4")
    assert dense["memory_mb"]["activations"] > 1200
    assert decided(dense) == ("cheap", 0, False)
    assert 0 < packed["full_layers"] < LAYERS
    assert 800 < packed["memory_mb"]["activations"] <= 1000
    assert decided(few) == ("cheap", 0, False)
    assert decided(planned(quant="nf4", recompute="cheap", **many)) == ("cheap", 0, False)


@on_linux
@pytest.mark.parametrize("asked", ["none", "cheap", "full"])
def test_what_is_asked_for_is_done_and_the_base_left_on_disk_for_it(asked: str, planned: Planned) -> None:
    free = planned(recompute=asked)
    assert decided(free) == (asked, 0, False)
    assert decided(planned(recompute=asked, max_memory=f"{peak(free) - 500}MB")) == (asked, 0, True)


def test_the_plan_says_what_is_given_up(planned: Planned, capsys: pytest.CaptureFixture[str]) -> None:
    free = planned()
    capsys.readouterr()
    planned(max_memory=f"{peak(free) - 200}MB")
    said = capsys.readouterr().err
    assert f"of {peak(free) - 200}MB allowed" in said
    assert f"of {LAYERS} layers are computed again" in said
    assert "streamed" not in said


@on_linux
def test_the_plan_says_that_the_base_stays_on_disk(planned: Planned, capsys: pytest.CaptureFixture[str]) -> None:
    planned(max_memory=f"{peak(planned(recompute='full')) - 800}MB")
    assert "base streamed from disk, 2 layers in memory at a time" in capsys.readouterr().err


def refused(planned: Planned, **flags: Any) -> str:
    with pytest.raises(ModelError) as caught:
        planned(**flags)
    return " ".join(str(caught.value).split())


@on_linux
def test_too_little_is_told_what_it_takes_and_the_nearest_way_out(planned: Planned) -> None:
    least = planned(recompute="full", max_memory=f"{peak(planned(recompute='full')) - 800}MB")
    said = refused(planned, max_memory=f"{peak(least) - 40}MB")
    assert f"--max-memory {peak(least) - 40}MB: this run takes" in said
    for part in ("though its base stays on disk", "the process itself", "weights in memory at a time",
                 "what is trained", "activations of", "--micro-tokens"):  # fmt: skip
        assert part in said
    tokens = int(said.split("--micro-tokens ")[1].split()[0])
    assert planned(max_memory=f"{peak(least) - 20}MB", micro_tokens=tokens)["streamed"]
    few = planned(micro_tokens=64, max_memory=f"{peak(least) + 100}MB")
    assert few["streamed"]
    assert "truetune quantize" in refused(planned, max_memory=f"{peak(few) - 200}MB", micro_tokens=64)


@on_linux
@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ({"quant": "nf4", "double_quant": True}, ("quantised while it is loaded", "--quant nf4 --double-quant")),
        ({"quant": "nf4", "dtype": "float32"}, ("without --quant", "large-nf4 --quant nf4 --dtype float32")),
        ({"dtype": "float32"}, ("in bf16, not in fp32", "way out --dtype bfloat16", "--quant nf4 --dtype float32")),
        ({"method": "full"}, ("--method full trains the base itself", "--method lora")),
    ],
    ids=["packed", "packed wide", "wide", "full"],
)
def test_a_base_that_can_not_stay_on_disk_is_told_why_and_the_way_out(
    flags: dict[str, Any], parts: tuple[str, ...], planned: Planned
) -> None:
    said = refused(planned, max_memory="600MB", **flags)
    assert "with its base in memory, and " in said
    assert all(part in said for part in parts)


def test_a_gpu_is_refused_before_anything_is_read() -> None:
    config = SFTConfig(model="m", data=("d",), max_memory="1GB")
    memory_plan.check_device(config, "cpu")
    memory_plan.check_device(SFTConfig(model="m", data=("d",)), "cuda")
    with pytest.raises(ConfigError, match=r"--max-memory 1GB.*cuda"):
        memory_plan.check_device(config, "cuda")


@on_linux
def test_a_streamed_run_is_the_resident_one_and_its_resumption_streams_again(
    make_tiny: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    model = make_tiny(tmp_path / "model", hidden_size=512, intermediate_size=1536, num_hidden_layers=6)
    plan = {"batch_size": 2, "max_steps": 2, "save_every": 1, "keep": 9}
    run_sft(model, data, tmp_path / "resident", **plan)  # first: it leaves buffers that count as the process's own
    sizes = run_sft(model, data, tmp_path / "plan", **plan, dry_run=True)["memory_mb"]
    limit = {"max_memory": f"{sizes['peak'] - sizes['weights'] * 0.6:.0f}MB"}  # 76 MB: far more than the process wavers
    run_sft(model, data, tmp_path / "streamed", **plan, **limit)
    card = json.loads((tmp_path / "streamed" / "adapter" / "truetune.json").read_text(encoding="utf-8"))
    assert card["facts"]["streamed"] is True
    tensors = "adapter/adapter_model.safetensors"
    assert same_tensors(tmp_path / "streamed" / tensors, tmp_path / "resident" / tensors)
    shutil.copytree(tmp_path / "streamed", tmp_path / "resumed")
    for name in ("adapter", "checkpoints/step-000002"):
        shutil.rmtree(tmp_path / "resumed" / name)
    (tmp_path / "resumed" / "report.md").unlink()
    run_sft(model, data, tmp_path / "resumed", **plan, **limit, resume="auto")
    assert differences(tmp_path / "streamed", tmp_path / "resumed") == []
