"""``--dry-run``: the plan, and nothing else; what it says is what the run then does."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from truetune.cli.main import main


@pytest.fixture(scope="module")
def command(tiny_model: Path, alpaca_file: Path) -> list[str]:
    return ["sft", "--model", str(tiny_model), "--data", str(alpaca_file), "--rank", "2", "--batch-size", "5"]


def test_a_dry_run_writes_nothing(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(path.stat().st_mtime_ns for path in [tiny_model, *tiny_model.iterdir()])
    assert main([*command, "--dry-run"]) == 0
    assert list(tmp_path.iterdir()) == []
    assert sorted(path.stat().st_mtime_ns for path in [tiny_model, *tiny_model.iterdir()]) == before


def test_the_plan_says_rows_tokens_steps_memory_and_time(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--dry-run", "--out", str(tmp_path / "o"), "--val-split", "0.3"]) == 0
    text = capsys.readouterr().err
    for part in ("12 rows · 12 used", "% trained", "tokens · ", "held out", "template: own", " K, fp32 (",
                 "r 2, alpha 32 on 14 layers", "trained (", "steps of 5 examples · about", "GB free"):  # fmt: skip
        assert part in text


def test_the_plan_is_what_the_run_does(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*command, "--out", str(tmp_path / "o"), "--epochs", "1", "--json"]
    assert main([*argv, "--dry-run"]) == 0
    plan = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(plan) == {
        "steps", "examples", "rows", "tokens", "trained_tokens", "parameters", "trainable_parameters", "recompute",
        "full_layers", "streamed", "memory_mb", "seconds",
    }  # fmt: skip
    assert main(argv) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    report = json.loads((tmp_path / "o" / "data" / "report.json").read_text(encoding="utf-8"))
    tensors = load_file(tmp_path / "o" / "adapter" / "adapter_model.safetensors")
    assert plan["steps"] == result["steps"] == 3
    assert plan["rows"] == {name: report[name] for name in ("read", "used", "rejected")}
    assert (plan["tokens"], plan["trained_tokens"]) == (report["tokens"], report["trained_tokens"])
    assert (plan["tokens"], plan["trained_tokens"]) == (result["tokens"], result["trained_tokens"])
    assert plan["trainable_parameters"] == sum(tensor.numel() for tensor in tensors.values())


def test_the_models_size_does_not_count_the_adapter(
    command: list[str], tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*command, "--dry-run", "--out", str(tmp_path), "--json"])
    plan = json.loads(capsys.readouterr().out.splitlines()[-1])
    weights = load_file(tiny_model / "model.safetensors")
    assert plan["parameters"] == sum(tensor.numel() for tensor in weights.values())
