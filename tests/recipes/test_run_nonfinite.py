"""A loss that is no longer a number stops the run before it does harm."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from training_runs import checkpoints, log, run_sft, write_rows
from truetune.checkpoint.atomic import is_valid
from truetune.cli.main import main
from truetune.errors import NonFiniteError

RARE = "Z"  # its embedding is infinite; one row of the data holds it


@pytest.fixture(scope="module")
def poisoned(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with one infinite row in its embedding table."""
    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("poisoned") / "tiny")
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][vocabulary[RARE]] = math.inf
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def rows(path: Path, rare: int) -> Path:
    """Ten rows, of which number ``rare`` (from 1) holds the rare letter."""
    lines = [{"instruction": f"Say {RARE if n == rare else 'a'} {n}", "output": f"{n} times"} for n in range(1, 11)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def failing_step(poisoned: Path, data: Path, out: Path, **flags: Any) -> tuple[int, str]:
    """The step that is named, and the whole message."""
    with pytest.raises(NonFiniteError) as caught:
        run_sft(poisoned, data, out, **{"batch_size": 1, "epochs": 1, "save_every": 1, "keep": 100, **flags})
    assert caught.value.exit_code == 3
    return int(str(caught.value).split(":")[0].removeprefix("step ")), str(caught.value)


@pytest.mark.parametrize("log_every", [1, 4])
def test_the_step_and_the_row_are_named(log_every: int, poisoned: Path, tmp_path: Path) -> None:
    data = rows(tmp_path / "rows.jsonl", rare=6)
    step, message = failing_step(poisoned, data, tmp_path / "out", log_every=log_every)
    assert "rows.jsonl, row 6" in message
    assert message.count("rows.jsonl, row") == 1
    assert "the weights are as they were before this step" in message
    assert checkpoints(tmp_path / "out")[-1:] == ([f"step-{step - 1:06d}"] if step > 1 else [])
    assert all(is_valid(path) for path in (tmp_path / "out" / "checkpoints").glob("step-*"))


def test_the_rows_are_written_out(poisoned: Path, tmp_path: Path) -> None:
    data = rows(tmp_path / "rows.jsonl", rare=6)
    failing_step(poisoned, data, tmp_path / "out")
    (line,) = (tmp_path / "out" / "data" / "nonfinite.jsonl").read_text().splitlines()
    found = json.loads(line)
    assert (Path(found["file"]).name, found["row"]) == ("rows.jsonl", 6)
    assert f"Say {RARE} 6" in found["text"]


def test_what_was_trained_before_is_that_of_a_run_without_the_row(poisoned: Path, tmp_path: Path) -> None:
    """The steps before the bad row, and nothing of the bad one, are in the last checkpoint."""
    step, _ = failing_step(poisoned, rows(tmp_path / "rows.jsonl", rare=6), tmp_path / "out")
    assert step > 1
    last = tmp_path / "out" / "checkpoints" / f"step-{step - 1:06d}"
    tensors = {**load_file(last / "adapter" / "adapter_model.safetensors"), **load_file(last / "optimizer.safetensors")}
    assert all(bool(torch.isfinite(t).all()) for t in tensors.values())
    assert [row["step"] for row in log(tmp_path / "out")] == list(range(1, step))
    assert not (tmp_path / "out" / "adapter").exists()


def test_the_command_ends_with_three(poisoned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = rows(tmp_path / "rows.jsonl", rare=6)
    arguments = ["sft", "--model", str(poisoned), "--data", str(data), "--out", str(tmp_path / "out")]
    assert main(arguments) == 3
    assert "error: step 1: the loss is not finite" in capsys.readouterr().err


def test_weights_thrown_out_of_range_are_not_saved(tiny_model: Path, tmp_path: Path) -> None:
    """The step's own loss and gradient were fine: only the weights can tell."""
    flags = {"method": "full", "lr": 1e39, "warmup": 0, "schedule": "constant", "batch_size": 4}
    step, message = failing_step(tiny_model, write_rows(tmp_path / "rows.jsonl"), tmp_path / "out", **flags)
    assert step == 1
    assert "a weight is no longer finite" in message
    assert "the weights are as they were" not in message
    assert not (tmp_path / "out" / "checkpoints").exists()
    assert not (tmp_path / "out" / "model").exists()


def test_a_rate_that_blows_the_loss_up_is_stopped(tiny_model: Path, tmp_path: Path) -> None:
    flags = {"method": "full", "lr": 1e25, "warmup": 0, "schedule": "constant", "batch_size": 4, "log_every": 5}
    step, message = failing_step(tiny_model, write_rows(tmp_path / "rows.jsonl"), tmp_path / "out", **flags)
    assert step == 2
    assert "is not finite; the weights are as they were" in message
    assert message.count("rows.jsonl, row") == 4


def test_a_held_out_loss_that_is_no_number_is_not_the_best(poisoned: Path, tmp_path: Path) -> None:
    data, held = rows(tmp_path / "rows.jsonl", rare=0), rows(tmp_path / "held.jsonl", rare=6)
    with pytest.raises(NonFiniteError, match="before training: the held-out loss is not finite"):
        run_sft(poisoned, data, tmp_path / "out", val_data=(str(held),))
    assert not (tmp_path / "out" / "checkpoints").exists()
