"""What methods make of the embedded base: flags, the table, a run for real and one that fails."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from bench.methods import quality

from truetune.config.methods import METHODS
from truetune.recipes import demo_data


def result(loss: float) -> dict[str, Any]:
    return {"val_loss_before": 3.0, "val_loss": loss, "lr": 1e-3, "bytes": 5000, "tok_s": 10.0, "peak_mb": 700.0}


def test_every_method_but_that_of_the_biases_is_measured() -> None:
    options = quality.parse([])
    assert set(options.methods) == set(METHODS) - {"bitfit"}
    assert set(quality.RATES) <= set(METHODS)


@pytest.mark.parametrize(
    ("flags", "said"), [(["--methods", "lara"], "lara: known are"), (["--steps", "0"], "at least 1")]
)
def test_wrong_flags_are_named(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        quality.parse(flags)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_the_lowest_loss_comes_first_and_a_failure_last() -> None:
    shown = quality.table({"dora": result(2.5), "full": {"failed": ["out of luck"]}, "lora": result(2.4)}).splitlines()
    assert [line.split()[0] for line in shown] == ["method", "lora", "dora", "full"]
    assert shown[-1].endswith("failed: out of luck")


def test_a_run_is_measured_and_one_that_fails_says_why(tmp_path: Path) -> None:
    train, held_out = demo_data.rows(tmp_path)
    few = tmp_path / "few.jsonl"
    few.write_text("".join(line for line in train.read_text(encoding="utf-8").splitlines(keepends=True)[:4]))
    options = argparse.Namespace(steps=1, batch_size=2, seed=0, threads=1, work=tmp_path)
    found = quality.one("lora", few, few, tmp_path, options)
    assert found["val_loss"] != found["val_loss_before"]
    assert found["bytes"] > 100_000
    json.dumps(found)
    failed = quality.one("lora", tmp_path / "none.jsonl", held_out, tmp_path / "x", options)
    assert "none.jsonl" in " ".join(failed["failed"])
