"""k steps, resume, and the rest are the same run as all steps at once, to the bit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from training_runs import BEST_BEFORE_LAST, checkpoints, cut_after, differences, log, run_pretrain, run_sft, write_rows

STEPS = 7  # 28 examples in steps of 4; the second pass begins in step 4 (counted from 1)
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"dropout": 0.2},
    "full": {"method": "full", "lr": 1e-3},
    "padded": {"dropout": 0.2, "packing": False, "micro_tokens": 100},
    "best": {**BEST_BEFORE_LAST, "select": "best"},
    "bf16": {"dtype": "bfloat16", "method": "full"},
    "parts": {"targets": ("embed_tokens", "q_proj"), "trainable": ("norm",)},
}


@pytest.fixture(scope="module")
def whole(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """``whole(kind)``: (rows, folder of an uninterrupted run that kept a checkpoint of each step)."""
    made: dict[str, tuple[Path, Path]] = {}

    def make(kind: str) -> tuple[Path, Path]:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            data = write_rows(folder / "rows.jsonl")
            run_sft(tiny_model, data, folder / "whole", save_every=1, keep=100, **KINDS[kind])
            made[kind] = data, folder / "whole"
        return made[kind]

    return make


@pytest.mark.parametrize("step", [1, 3, 4, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_run_to_the_bit(
    kind: str, step: int, whole: Callable[[str], tuple[Path, Path]], tiny_model: Path, tmp_path: Path
) -> None:
    data, first = whole(kind)
    last = int(checkpoints(first)[-1].removeprefix("step-"))
    out = cut_after(first, min(step, last - 1), tmp_path / "resumed")
    run_sft(tiny_model, data, out, save_every=1, keep=100, resume="auto", **KINDS[kind])
    assert differences(first, out) == []


def test_the_runs_do_learn(whole: Callable[[str], tuple[Path, Path]]) -> None:
    """Were nothing trained, everything above would hold by accident."""
    losses = [row["loss"] for row in log(whole("lora")[1])]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 0.05


def test_the_best_state_is_not_the_last_in_these_runs(whole: Callable[[str], tuple[Path, Path]]) -> None:
    """Nor would choosing the best be put to the test.

    It leads by far more than two machines or two releases of torch differ by.
    """
    losses = [row["val_loss"] for row in log(whole("best")[1]) if row.get("val_loss") and row["step"]]
    first, second = sorted(losses)[:2]
    assert losses.index(first) not in (0, len(losses) - 1)
    assert second - first > 0.05


def test_another_seed_is_another_run(
    whole: Callable[[str], tuple[Path, Path]], tiny_model: Path, tmp_path: Path
) -> None:
    data, first = whole("lora")
    run_sft(tiny_model, data, tmp_path / "other", save_every=1, keep=100, seed=1, **KINDS["lora"])
    assert "adapter/adapter_model.safetensors" in differences(first, tmp_path / "other")


def test_a_run_that_saved_nothing_yet_starts_over_and_logs_each_step_once(
    whole: Callable[[str], tuple[Path, Path]], tiny_model: Path, tmp_path: Path
) -> None:
    data, first = whole("best")
    out = cut_after(first, 0, tmp_path / "resumed")
    run_sft(tiny_model, data, out, save_every=1, keep=100, resume="auto", **KINDS["best"])
    assert differences(first, out) == []


def test_a_run_killed_after_its_last_checkpoint_is_completed_with_its_figures(
    whole: Callable[[str], tuple[Path, Path]], tiny_model: Path, tmp_path: Path
) -> None:
    data, first = whole("best")
    again = run_sft(tiny_model, data, tmp_path / "again", save_every=1, keep=100, **KINDS["best"])
    out = cut_after(tmp_path / "again", 99, tmp_path / "resumed")
    result = run_sft(tiny_model, data, out, save_every=1, keep=100, resume="auto", **KINDS["best"])
    assert differences(first, out) == []
    assert {k: again[k] for k in ("loss", "val_loss", "val_accuracy", "best_step", "tokens")} == {
        k: result[k] for k in ("loss", "val_loss", "val_accuracy", "best_step", "tokens")
    }


def test_a_partial_last_line_of_the_log_is_not_a_row(
    whole: Callable[[str], tuple[Path, Path]], tiny_model: Path, tmp_path: Path
) -> None:
    data, first = whole("lora")
    out = cut_after(first, 3, tmp_path / "resumed")
    text = (out / "log.jsonl").read_text()
    (out / "log.jsonl").write_text(text[: text.index('"step": 5') + 30])
    run_sft(tiny_model, data, out, save_every=1, keep=100, resume="auto", **KINDS["lora"])
    assert differences(first, out) == []


@pytest.mark.parametrize("epochs", [0.3, 1.6])
def test_a_fraction_of_an_epoch_resumes_too(epochs: float, tiny_model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl")
    kind = {"dropout": 0.1, "epochs": epochs, "save_every": 1, "keep": 100}
    run_sft(tiny_model, data, tmp_path / "whole", **kind)
    out = cut_after(tmp_path / "whole", 1, tmp_path / "resumed")
    run_sft(tiny_model, data, out, resume="auto", **kind)
    assert differences(tmp_path / "whole", out) == []


def test_fewer_rows_than_a_batch_resume_too(tiny_model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 3)
    kind = {"dropout": 0.1, "batch_size": 8, "max_steps": 4, "save_every": 1, "keep": 100}
    run_sft(tiny_model, data, tmp_path / "whole", **kind)
    assert [row["tokens"] for row in log(tmp_path / "whole")] != [0] * 4
    out = cut_after(tmp_path / "whole", 2, tmp_path / "resumed")
    run_sft(tiny_model, data, out, resume="auto", **kind)
    assert differences(tmp_path / "whole", out) == []


def test_pretraining_resumes_to_the_bit(tiny_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "texts.jsonl"
    text.write_text("".join(json.dumps({"text": f"Paragraph {n} says {n * n}."}) + "\n" for n in range(40)))
    kind = {"max_length": 32, "batch_size": 4, "max_steps": 5, "save_every": 1, "keep": 100, "val_split": 0.2}
    run_pretrain(tiny_model, text, tmp_path / "whole", **kind)
    out = cut_after(tmp_path / "whole", 2, tmp_path / "resumed")
    run_pretrain(tiny_model, text, out, resume="auto", **kind)
    assert differences(tmp_path / "whole", out) == []
