"""Runs of methods that keep a state of their own, or draw by the step, resume to the very same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from training_runs import cut_after, differences, run_sft, same_tensors, write_rows

TENSORS = "**/[aw]*.safetensors"  # of the adapter, or the base's own weights
KINDS: dict[str, dict[str, Any]] = {
    "adalora": {"method": "adalora", "rank": 4, "target_rank": 2, "prune_every": 2, "dropout": 0.1},
    "vera": {"method": "vera", "rank": 16, "dropout": 0.1, "lr": 5e-2},
    "vera-seed": {"method": "vera", "rank": 16, "save_projection": False, "lr": 5e-2},
    "ia3": {"method": "ia3", "lr": 5e-2},
    "bitfit": {"method": "bitfit", "dtype": "bfloat16"},
    "freeze": {"method": "freeze", "train_layers": 1},
    "lisa": {"method": "lisa", "lisa_layers": 1, "lisa_every": 2},
    "lora-plus": {"lora_plus_ratio": 8.0, "optim": "adamw8bit"},
    "neftune": {"neftune_alpha": 5.0},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_run_to_the_bit(kind: str, make_tiny: Callable[..., Path], tmp_path: Path) -> None:
    base = make_tiny(tmp_path / "base", attention_bias=True, num_hidden_layers=3)
    data = write_rows(tmp_path / "rows.jsonl")
    settings: dict[str, Any] = {"save_every": 1, "keep": 100, "max_steps": 7, **KINDS[kind]}
    run_sft(base, data, tmp_path / "whole", **settings)
    early, late = (next((tmp_path / "whole" / "checkpoints" / f"step-{n:06d}").glob(TENSORS)) for n in (1, 7))
    assert not same_tensors(early, late)  # were nothing trained, what follows would hold by accident
    assert (late.parents[kind != "freeze" and kind != "lisa"] / "method.safetensors").is_file() == (kind == "adalora")
    for step in (3, 6) if kind == "adalora" else (3,):  # while it prunes, and after that
        out = cut_after(tmp_path / "whole", step, tmp_path / f"resumed-{step}")
        run_sft(base, data, out, resume="auto", **settings)
        assert differences(tmp_path / "whole", out) == []


def test_noise_and_a_faster_b_are_other_runs(tiny_model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl")
    for name in ("lora", "lora-plus", "neftune"):
        run_sft(tiny_model, data, tmp_path / name, max_steps=2, **KINDS.get(name, {}))
    assert "adapter/adapter_model.safetensors" in differences(tmp_path / "lora", tmp_path / "lora-plus")
    assert "adapter/adapter_model.safetensors" in differences(tmp_path / "lora", tmp_path / "neftune")


def test_the_best_state_of_adalora_is_settled_as_its_last_is(tiny_model: Path, tmp_path: Path) -> None:
    kind = KINDS["adalora"] | {"val_split": 0.3, "eval_every": 1, "select": "best", "max_steps": 5}
    result = run_sft(tiny_model, write_rows(tmp_path / "rows.jsonl"), tmp_path / "out", **kind)
    assert result["best_step"] is not None
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
