"""A run's own record makes the same result again, to the bit; and its report says what that depends on."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import truetune
from proof_runs import change_json
from training_runs import differences, run_sft, same_tensors, write_rows
from truetune.cli.main import main


def test_run_yaml_makes_the_same_adapter_bit_for_bit(tmp_path: Path, tiny_model: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    first, again = tmp_path / "first", tmp_path / "again"
    run_sft(tiny_model, rows, first, dropout=0.1, val_split=0.2, eval_every=2, neftune_alpha=5.0, seed=11)
    torch.manual_seed(99)  # whatever this process drew before must not matter
    assert main(["sft", "--config", str(first / "run.yaml"), "--out", str(again)]) == 0
    assert differences(first, again) == []
    other = tmp_path / "other"
    assert main(["sft", "--config", str(first / "run.yaml"), "--out", str(other), "--seed", "12"]) == 0
    weights = Path("adapter") / "adapter_model.safetensors"
    assert same_tensors(first / weights, again / weights)
    assert not same_tensors(first / weights, other / weights)


def test_what_can_be_no_repeat_says_why(tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, first = write_rows(tmp_path / "rows.jsonl"), tmp_path / "first"
    run_sft(tiny_model, rows, first, max_steps=1)
    ask = ["sft", "--config", str(first / "run.yaml"), "--out"]
    capsys.readouterr()
    assert main([*ask, str(tmp_path / "same")]) == 0
    assert "no repeat" not in capsys.readouterr().err
    assert main(["sft", "--config", str(first / "run.yaml"), "--out", str(tmp_path / "on purpose"), "--seed", "5"]) == 0
    assert "no repeat" not in capsys.readouterr().err
    facts = facts_with(first, torch="1.0") | {"compute": "bfloat16"}
    change_json(first / "adapter" / "truetune.json", facts=facts)
    rows.write_text("".join(rows.read_text(encoding="utf-8").splitlines(keepends=True)[:-1]), encoding="utf-8")
    assert main([*ask, str(tmp_path / "other")]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert (
        f"no repeat of {first}: other than then are its data, its precision, torch 1.0, now {torch.__version__}" in said
    )


def facts_with(run: Path, **environment: str) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((run / "adapter" / "truetune.json").read_text(encoding="utf-8"))["facts"]
    return facts | {"environment": facts["environment"] | environment}


def test_the_report_says_what_it_depends_on(tmp_path: Path, tiny_model: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    run_sft(tiny_model, rows, tmp_path / "run", max_steps=1)
    report = (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    assert f"truetune sft --config {tmp_path / 'run' / 'run.yaml'} --out again" in report
    assert hashlib.sha256(rows.read_bytes()).hexdigest() in report
    for words in (f"truetune {truetune.__version__}", f"torch {torch.__version__}", "kernels:", "threads:"):
        assert words in report


def test_a_card_for_the_hub_tells_what_the_run_recorded(tmp_path: Path, tiny_model: Path) -> None:
    import yaml

    rows = write_rows(tmp_path / "rows.jsonl")
    base = tmp_path / "base"
    base.mkdir()
    for path in tiny_model.iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    (base / "README.md").write_text("---\nlicense: mit\n---\n# Base\n", encoding="utf-8")
    run_sft(base, rows, tmp_path / "run", val_split=0.3, max_steps=2)
    ask = ["export", "--to", "card", "--adapter", str(tmp_path / "run"), "--out"]
    assert main([*ask, str(tmp_path / "card")]) == 0
    text = (tmp_path / "card" / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["base_model"] == "base"  # its folder is nobody else's business
    assert str(tmp_path) not in text
    assert (front["license"], front["library_name"]) == ("mit", "peft")
    assert front["model-index"][0]["results"][0]["metrics"][0]["type"] == "loss"
    assert "| rows read | 14 |" in text
    assert "Nobody stated a licence for the tuned weights; the base's is mit" in text
    assert main([*ask, str(tmp_path / "card")]) == 2  # one that is there is not touched
    assert main([*ask, str(tmp_path / "other"), "--license", "apache-2.0"]) == 0
    assert "license: apache-2.0" in (tmp_path / "other" / "README.md").read_text(encoding="utf-8")
    change_json(tmp_path / "run" / "adapter" / "truetune.json", metrics=None, data=None)
    assert main([*ask, str(tmp_path / "bare")]) == 0
    assert "## Results" not in (tmp_path / "bare" / "README.md").read_text(encoding="utf-8")
