"""Runs with another optimizer: resumed they are the run, and what they leave is safetensors and JSON."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from training_runs import differences, log, run_sft, write_rows
from truetune.errors import CheckpointError

FLAGS = {"method": "full", "lr": 1e-3, "weight_decay": 0.1, "max_steps": 5, "save_every": 1, "keep": 100}


@pytest.mark.parametrize("name", ["adamw8bit", "lion8bit", "ademamix8bit", "rmsprop8bit", "lamb8bit", "lion", "sgd"])
def test_a_resumed_run_is_the_run_to_the_bit(name: str, tiny_model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl")
    run_sft(tiny_model, data, tmp_path / "whole", optim=name, **FLAGS)
    cut = shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for step in (3, 4, 5):
        shutil.rmtree(cut / "checkpoints" / f"step-{step:06d}")
    shutil.rmtree(cut / "model")
    (cut / "report.md").unlink()
    run_sft(tiny_model, data, cut, optim=name, resume="auto", **FLAGS)
    assert differences(tmp_path / "whole", cut) == []
    losses = [row["loss"] for row in log(cut)]
    assert len(losses) == 5
    assert len(set(losses)) == 5


def test_state_is_saved_as_codes_and_scales_and_no_more(tiny_model: Path, tmp_path: Path) -> None:
    run_sft(tiny_model, write_rows(tmp_path / "rows.jsonl"), tmp_path / "out", optim="adamw8bit", **FLAGS)
    folder = tmp_path / "out" / "checkpoints" / "step-000005"
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".safetensors", ".json"}
    saved = load_file(folder / "optimizer.safetensors")
    table = {key.rpartition(".")[2]: value for key, value in saved.items() if "embed_tokens" in key}
    assert set(table) == {"step", "state1", "state2", "absmax1", "absmax2"}
    assert table["state1"].dtype == torch.uint8
    assert table["step"] == 5
    assert {key.rpartition(".")[2] for key in saved if "norm" in key} == {"step", "state1", "state2"}


def test_another_optimizer_is_another_run(tiny_model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl")
    run_sft(tiny_model, data, tmp_path / "out", optim="adamw8bit", **FLAGS)
    with pytest.raises(CheckpointError, match="--optim: 'adamw8bit', now 'lion'"):
        run_sft(tiny_model, data, tmp_path / "out", optim="lion", resume="auto", **FLAGS)
