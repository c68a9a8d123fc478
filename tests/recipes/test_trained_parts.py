"""LoRA with parts of the base in training: these are float32, the rest stays as it is."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from families import FAMILIES
from training_runs import differences, run_sft, write_rows
from truetune.models import load
from truetune.recipes import training


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The models that runs load."""
    seen: list[Any] = []
    own = load.load_model
    monkeypatch.setattr(training.load, "load_model", lambda *a, **k: seen.append(own(*a, **k)) or seen[-1])
    return seen


@pytest.mark.parametrize("part", ["norm", "embedding", "head"])
def test_only_the_trained_parts_are_wide(
    part: str, make_tiny: Callable[..., Path], tmp_path: Path, models: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    base = make_tiny(tmp_path / "base", dtype="bfloat16", tie_word_embeddings=False)
    result = run_sft(base, write_rows(tmp_path / "rows.jsonl"), tmp_path / "o", dtype="bfloat16", trainable=(part,))
    (model,) = models
    wide = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert wide == {name for name, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for name, p in model.named_parameters() if name not in wide} == {torch.bfloat16}
    first = json.loads((tmp_path / "o" / "log.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert result["loss"] < first["loss"]
    assert "bf16 (as asked; the trained parts stay in float32)" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["phi", "gpt2", "opt"])
def test_biases_of_other_families_are_trained_beside_narrow_weights(
    name: str, make_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """Each family puts its biases and norms into other functions, and autocast has to know them all."""
    base = make_tiny(tmp_path / "base")
    size = {"n_positions": 128} if name == "gpt2" else {"max_position_embeddings": 128}
    kind = FAMILIES[name]
    config = kind.config(**{**kind.settings, **size}, vocab_size=300, bos_token_id=1, eos_token_id=2, pad_token_id=None)
    torch.manual_seed(0)
    load.save_model(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), base)
    rows = write_rows(tmp_path / "rows.jsonl")
    result = run_sft(base, rows, tmp_path / "o", dtype="bfloat16", trainable=("bias", "norm"), targets=("all-linear",))
    assert result["loss"] < 6


def test_going_on_is_exact_and_says_why(
    make_tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = make_tiny(tmp_path / "base", dtype="bfloat16")
    rows = write_rows(tmp_path / "rows.jsonl")
    settings: dict[str, Any] = {"dtype": "bfloat16", "trainable": ("norm",), "save_every": 2, "keep": 9}
    run_sft(base, rows, tmp_path / "one", **settings)
    run_sft(base, rows, tmp_path / "two", **settings)
    last = sorted((tmp_path / "two" / "checkpoints").iterdir())[-1]
    for path in last.iterdir():
        if path.is_file():
            path.unlink()
    capsys.readouterr()
    run_sft(base, rows, tmp_path / "two", resume="auto", **settings)
    assert "bf16 (as this run was started; the trained parts" in capsys.readouterr().err
    assert differences(tmp_path / "one", tmp_path / "two") == []
