"""What a resumption refuses, what it passes over, and what it says."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from training_runs import BEST_BEFORE_LAST, checkpoints, differences, log, run_sft, same_tensors, write_rows
from truetune.checkpoint.atomic import is_valid
from truetune.errors import CheckpointError, OutputError
from truetune.recipes import run_folder

FLAGS = {"dropout": 0.1, "save_every": 1, "keep": 100, "val_split": 0.3}


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``rows.jsonl`` and the finished run ``out``. Copy before changing."""
    folder = tmp_path_factory.mktemp("finished")
    run_sft(tiny_model, write_rows(folder / "rows.jsonl"), folder / "out", **FLAGS)
    return folder


@pytest.fixture
def cut(finished: Path, tmp_path: Path) -> Path:
    """A copy of the run that has done 3 steps; the data beside it is the original's."""
    shutil.copytree(finished / "out", tmp_path / "out")
    for path in (tmp_path / "out" / "checkpoints").iterdir():
        if path.name > "step-000003":
            shutil.rmtree(path)
    shutil.rmtree(tmp_path / "out" / "adapter")
    return tmp_path / "out"


def truncate(checkpoint: Path) -> None:
    path = checkpoint / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


def flip(checkpoint: Path) -> None:
    path = checkpoint / "adapter" / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))


def spoil_manifest(checkpoint: Path) -> None:
    path = checkpoint / "MANIFEST.json"
    path.write_text(path.read_text().replace('"size"', '"sizf"'))


DAMAGE = {
    "truncated": truncate,
    "flipped": flip,
    "file missing": lambda c: (c / "state.json").unlink(),
    "state cut": lambda c: (c / "state.json").write_text('{"step": 3'),
    "no manifest": lambda c: (c / "MANIFEST.json").unlink(),
    "empty manifest": lambda c: (c / "MANIFEST.json").write_text(""),
    "odd manifest": spoil_manifest,
    "a list": lambda c: (c / "MANIFEST.json").write_text('{"files": []}'),
    "empty folder": lambda c: [shutil.rmtree(c), c.mkdir()],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_checkpoint_is_passed_over_and_said(
    damage: str, cut: Path, finished: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    DAMAGE[damage](cut / "checkpoints" / "step-000003")
    run_sft(tiny_model, finished / "rows.jsonl", cut, resume="auto", **FLAGS)
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(r"step-000003 is not complete and is passed over", said)
    assert re.search(r"resume from \S+step-000002, step 2 of", said)
    assert differences(finished / "out", cut) == []


def test_with_no_whole_checkpoint_the_run_starts_over_and_says_so(
    cut: Path, finished: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (cut / "checkpoints").iterdir():
        flip(path)
    run_sft(tiny_model, finished / "rows.jsonl", cut, resume="auto", **FLAGS)
    assert "the run starts from the beginning" in capsys.readouterr().err
    assert differences(finished / "out", cut) == []


def test_a_damaged_checkpoint_does_not_push_out_the_whole_ones(cut: Path, finished: Path, tiny_model: Path) -> None:
    flip(cut / "checkpoints" / "step-000003")
    run_sft(tiny_model, finished / "rows.jsonl", cut, resume="auto", **(FLAGS | {"keep": 1, "save_every": 0}))
    assert all(is_valid(path) for path in (cut / "checkpoints").iterdir())


def test_a_named_checkpoint_that_is_damaged_is_refused_with_the_fault(
    cut: Path, finished: Path, tiny_model: Path
) -> None:
    named = cut / "checkpoints" / "step-000003"
    truncate(named)
    with pytest.raises(CheckpointError, match="not a complete checkpoint") as caught:
        run_sft(tiny_model, finished / "rows.jsonl", cut, resume=str(named), **FLAGS)
    assert "optimizer.safetensors has" in str(caught.value)


def test_a_named_checkpoint_is_gone_on_from(cut: Path, finished: Path, tiny_model: Path) -> None:
    run_sft(tiny_model, finished / "rows.jsonl", cut, resume=str(cut / "checkpoints" / "step-000001"), **FLAGS)
    assert differences(finished / "out", cut) == []


def test_an_old_checkpoint_of_a_finished_run_can_be_gone_on_from(
    finished: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(finished / "out", tmp_path / "out")
    flags = FLAGS | {"keep": 1}
    run_sft(tiny_model, finished / "rows.jsonl", out, resume=str(out / "checkpoints" / "step-000002"), **flags)
    assert "step-000003" in capsys.readouterr().err  # it says what it makes again
    assert all(is_valid(path) for path in (out / "checkpoints").iterdir())
    assert differences(finished / "out", out) == []


def test_a_checkpoint_can_be_gone_on_from_in_another_folder(finished: Path, tiny_model: Path, tmp_path: Path) -> None:
    named = finished / "out" / "checkpoints" / "step-000002"
    before = {p: p.stat().st_mtime_ns for p in (finished / "out").rglob("*")}
    run_sft(tiny_model, finished / "rows.jsonl", tmp_path / "new", resume=str(named), **FLAGS)
    file = "adapter/adapter_model.safetensors"
    assert same_tensors(finished / "out" / file, tmp_path / "new" / file)
    assert {p: p.stat().st_mtime_ns for p in (finished / "out").rglob("*")} == before


def test_another_folder_is_no_way_round_the_settings(finished: Path, tiny_model: Path, tmp_path: Path) -> None:
    named = finished / "out" / "checkpoints" / "step-000002"
    with pytest.raises(CheckpointError, match="other settings") as caught:
        run_sft(tiny_model, finished / "rows.jsonl", tmp_path / "new", resume=str(named), **(FLAGS | {"seed": 4}))
    assert "--seed: 0, now 4" in str(caught.value)


def test_no_checkpoint_at_all_is_refused(finished: Path, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no checkpoint of truetune"):
        run_sft(tiny_model, finished / "rows.jsonl", tmp_path / "new", resume=str(finished), **FLAGS)


@pytest.mark.parametrize(
    ("flags", "named"),
    [({"lr": 5e-3}, "--lr: 0.01, now 0.005"), ({"batch_size": 2}, "--batch-size: 4, now 2"),
     ({"rank": 2}, "--rank: 4, now 2"), ({"dropout": 0.0}, "--dropout: 0.1, now 0.0"),
     ({"epochs": 3}, "--epochs: 2.0, now 3.0"),
     ({"targets": ("q_proj",)}, "--targets: ['all-linear'], now ['q_proj']"),
     ({"val_split": 0.1}, "--val-split: 0.3, now 0.1")],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_changed_settings_are_refused_by_name(
    flags: dict[str, object], named: str, cut: Path, finished: Path, tiny_model: Path
) -> None:
    with pytest.raises(CheckpointError, match="other settings") as caught:
        run_sft(tiny_model, finished / "rows.jsonl", cut, resume="auto", **{**FLAGS, **flags})
    assert named in str(caught.value)


@pytest.mark.parametrize("flags", [{"keep": 3}, {"save_every": 2}, {"log_every": 2}, {"select": "best"}], ids=str)
def test_settings_that_change_no_number_may_change(
    flags: dict[str, object], cut: Path, finished: Path, tiny_model: Path
) -> None:
    run_sft(tiny_model, finished / "rows.jsonl", cut, resume="auto", **{**FLAGS, **flags})
    last = f"checkpoints/{checkpoints(cut)[-1]}/adapter/adapter_model.safetensors"
    assert same_tensors(finished / "out" / last, cut / last)


@pytest.mark.parametrize(("row", "named"), [(0, "data"), (None, "held-out data")])
def test_changed_rows_are_refused(row: int | None, named: str, tiny_model: Path, tmp_path: Path) -> None:
    data, held = write_rows(tmp_path / "rows.jsonl"), write_rows(tmp_path / "held.jsonl", 3)
    flags = {"save_every": 1, "val_data": (str(held),), "max_steps": 2}
    run_sft(tiny_model, data, tmp_path / "out", **flags)
    changed = data if row == 0 else held
    changed.write_text(changed.read_text().replace("Count up to 1", "Count up to one", 1))
    with pytest.raises(CheckpointError, match=rf"--resume: the {named} is not what this run was started on"):
        run_sft(tiny_model, data, tmp_path / "out", resume="auto", **flags)


def test_another_base_under_the_same_name_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_model, tmp_path / "base")
    data = write_rows(tmp_path / "rows.jsonl")
    run_sft(base, data, tmp_path / "out", max_steps=2)
    weights = base / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-20_000:] = bytes(20_000)
    weights.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match="base model's weights"):
        run_sft(base, data, tmp_path / "out", max_steps=2, resume="auto")


def test_another_number_of_threads_is_said(
    cut: Path, finished: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        run_sft(tiny_model, finished / "rows.jsonl", cut, resume="auto", **FLAGS)
    finally:
        torch.set_num_threads(before)
    assert f"threads {before}, now {before + 1}" in " ".join(capsys.readouterr().err.split())


def test_a_finished_run_says_so_and_changes_nothing(
    finished: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "rows.jsonl")
    first = run_sft(tiny_model, data, tmp_path / "out", **FLAGS)
    before = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in (tmp_path / "out").rglob("*")}
    again = run_sft(tiny_model, data, tmp_path / "out", resume="auto", **FLAGS)
    assert "is complete: nothing is left to do" in capsys.readouterr().err
    assert {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in (tmp_path / "out").rglob("*")} == before
    measured = ("seconds", "peak_mb")
    assert {k: v for k, v in again.items() if k not in measured} == {
        k: v for k, v in first.items() if k not in measured
    }


def test_a_finished_run_gives_its_best_state_when_asked_afterwards(tiny_model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl")
    first = run_sft(tiny_model, data, tmp_path / "out", **BEST_BEFORE_LAST)
    assert first["best_step"] < first["steps"]
    again = run_sft(tiny_model, data, tmp_path / "out", resume="auto", select="best", **BEST_BEFORE_LAST)
    assert again["val_loss"] == min(
        row["val_loss"] for row in log(tmp_path / "out") if row.get("val_loss") and row["step"]
    )
    best = tmp_path / "out" / "checkpoints" / f"step-{first['best_step']:06d}" / "adapter" / "adapter_model.safetensors"
    assert same_tensors(best, tmp_path / "out" / "adapter" / "adapter_model.safetensors")


def test_a_lost_best_checkpoint_is_said_and_sought_anew(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "rows.jsonl")
    flags = {
        "val_split": 0.3,
        "eval_every": 1,
        "lr": 0.1,
        "seed": 2,
        "schedule": "constant",
        "keep": 100,
        "save_every": 1,
    }
    run_sft(tiny_model, data, tmp_path / "out", **flags)
    losses = [row["val_loss"] for row in log(tmp_path / "out") if "val_loss" in row][1:4]
    assert losses.index(min(losses)) == 1  # of the first three steps, the second is the best
    for step in (2, 4, 5):
        shutil.rmtree(tmp_path / "out" / "checkpoints" / f"step-{step:06d}")
    second = run_sft(tiny_model, data, tmp_path / "out", resume="auto", select="best", **flags)
    assert "the best checkpoint so far, step 2, is not in" in " ".join(capsys.readouterr().err.split())
    assert second["best_step"] > 3


def test_a_second_process_in_the_same_folder_is_refused(finished: Path, cut: Path, tiny_model: Path) -> None:
    with run_folder.locked(run_folder.RunFolder(cut, None)), pytest.raises(OutputError, match="another process"):
        run_sft(tiny_model, finished / "rows.jsonl", cut, resume="auto", **FLAGS)
    assert json.loads((cut / "log.jsonl").read_text().splitlines()[-1])["step"] == log(finished / "out")[-1]["step"]


def test_what_a_kill_in_the_first_write_leaves_is_no_obstacle(finished: Path, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".run.yaml.tmp-4711").write_text("half a fi")
    (tmp_path / "out" / ".lock").touch()
    run_sft(tiny_model, finished / "rows.jsonl", tmp_path / "out", resume="auto", **FLAGS)
    assert differences(finished / "out", tmp_path / "out") == []
    assert not list((tmp_path / "out").glob(".run.yaml*"))


def test_a_setting_younger_than_the_run_is_taken_as_its_default(cut: Path, finished: Path, tiny_model: Path) -> None:
    """A run goes on under a version that knows more settings; what was never asked for can't have changed."""
    settings = cut / "run.yaml"
    lines = settings.read_text(encoding="utf-8").splitlines(keepends=True)
    settings.write_text("".join(line for line in lines if "neftune_alpha" not in line), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"--neftune-alpha: None, now 5\.0"):
        run_sft(tiny_model, finished / "rows.jsonl", cut, resume="auto", neftune_alpha=5.0, **FLAGS)
    run_sft(tiny_model, finished / "rows.jsonl", cut, resume="auto", **FLAGS)
    assert differences(finished / "out", cut) == []


def test_a_proof_may_be_asked_for_on_resuming(cut: Path, finished: Path, tiny_model: Path) -> None:
    run_sft(tiny_model, finished / "rows.jsonl", cut, resume="auto", verify_prompts=3, **FLAGS)
    assert differences(finished / "out", cut) == []
