"""What a run leaves, where it may write, and what a full disk does to it."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from training_runs import BEST_BEFORE_LAST, checkpoints, differences, log, run_sft, same_tensors, write_rows
from truetune.checkpoint.atomic import is_valid
from truetune.errors import OutputError
from truetune.train.log import RunLog, Screen

ROW_KEYS = {"step", "loss", "tokens", "trained_tokens", "lr", "grad_norm", "tok_s", "peak_mb"}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """``small_disk("size=1m")`` mounts a tmpfs, or changes the one that is there."""
    where = tmp_path / "disk"
    where.mkdir()

    def mount(options: str) -> Path:
        again = ["-o", "remount"] if os.path.ismount(where) else []
        command = ["mount", "-t", "tmpfs", *again, "-o", options, "tmpfs", str(where)]
        if shutil.which("mount") is None or os.name != "posix" or os.geteuid() != 0:
            pytest.skip("only root may mount a small disk")
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("no disk may be mounted here")
        return where

    yield mount
    if os.path.ismount(where):
        subprocess.run(["umount", str(where)], check=True)


def test_the_log_has_the_keys_it_promises(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    run_sft(tiny_model, data, tmp_path / "out", val_split=0.3, eval_every=2)
    rows = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert all(set(row) == ROW_KEYS for row in steps)
    assert all(set(row) == {"step", "val_loss", "val_tokens"} for row in rows if "loss" not in row)
    assert [row["step"] for row in steps] == list(range(1, len(steps) + 1))


def test_log_every_writes_every_nth_step_and_the_last(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    run_sft(tiny_model, data, tmp_path / "one")
    run_sft(tiny_model, data, tmp_path / "three", log_every=3)
    assert [row["step"] for row in log(tmp_path / "three")] == [3, 6, 7]
    assert log(tmp_path / "three") == [row for row in log(tmp_path / "one") if row["step"] in (3, 6, 7)]


def test_the_report_s_rows_add_up(tiny_model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 150)
    with data.open("a") as file:
        file.write('{"instruction": "half a row\n')
        file.write(json.dumps({"instruction": "no answer"}) + "\n")
        file.write(json.dumps({"instruction": "long", "output": "x" * 500}) + "\n")
    run_sft(tiny_model, data, tmp_path / "out", max_bad_rows=2, val_split=0.2, max_steps=1)
    report = json.loads((tmp_path / "out" / "data" / "report.json").read_text())
    assert report["read"] == 153
    assert sum(report["rejected"].values()) == 3
    assert report["read"] == report["used"] + sum(report["rejected"].values())
    rejects = (tmp_path / "out" / "data" / "rejects.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["row"] for line in rejects) == [151, 152, 153]
    assert {"tokens", "trained_tokens", "max_length_seen", "packing_fill"} <= set(report)


def test_one_epoch_trains_the_tokens_the_report_counts(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    result = run_sft(tiny_model, data, tmp_path / "out", epochs=1)
    report = json.loads((tmp_path / "out" / "data" / "report.json").read_text())
    assert (result["tokens"], result["trained_tokens"]) == (report["tokens"], report["trained_tokens"])
    assert sum(row["trained_tokens"] for row in log(tmp_path / "out")) == report["trained_tokens"]


@pytest.mark.parametrize("packing", [True, False])
def test_the_fill_is_the_share_of_real_tokens(packing: bool, tiny_model: Path, data: Path, tmp_path: Path) -> None:
    run_sft(tiny_model, data, tmp_path / "out", packing=packing)
    fill = json.loads((tmp_path / "out" / "data" / "report.json").read_text())["packing_fill"]
    assert fill == 1.0 if packing else 0.5 < fill < 1.0


def test_select_best_gives_the_best_checkpoint(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    result = run_sft(tiny_model, data, tmp_path / "out", select="best", **BEST_BEFORE_LAST)
    losses = {row["step"]: row["val_loss"] for row in log(tmp_path / "out") if "val_loss" in row and row["step"]}
    assert result["best_step"] == min(losses, key=losses.__getitem__) != result["steps"]
    assert result["val_loss"] == losses[result["best_step"]]
    out = tmp_path / "out"
    best = out / "checkpoints" / f"step-{result['best_step']:06d}" / "adapter" / "adapter_model.safetensors"
    assert same_tensors(best, out / "adapter" / "adapter_model.safetensors")


def test_the_last_state_is_the_result_unless_the_best_is_asked_for(
    tiny_model: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = run_sft(tiny_model, data, out, **BEST_BEFORE_LAST)
    assert result["best_step"] < result["steps"]
    last = out / "checkpoints" / checkpoints(out)[-1] / "adapter" / "adapter_model.safetensors"
    assert same_tensors(last, out / "adapter" / "adapter_model.safetensors")


def test_keep_leaves_the_newest_few(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    run_sft(tiny_model, data, tmp_path / "out", save_every=1, keep=2)
    assert checkpoints(tmp_path / "out") == ["step-000006", "step-000007"]


def test_the_best_checkpoint_stays_however_old(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    result = run_sft(tiny_model, data, tmp_path / "out", save_every=1, keep=1, **BEST_BEFORE_LAST)
    assert checkpoints(tmp_path / "out") == [f"step-{step:06d}" for step in (result["best_step"], result["steps"])]


def test_a_checkpoint_s_adapter_is_the_result_s_format(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_sft(tiny_model, data, out)
    inside = out / "checkpoints" / checkpoints(out)[-1] / "adapter"
    settings = [json.loads((folder / "adapter_config.json").read_text()) for folder in (inside, out / "adapter")]
    changing = ("base_model_name_or_path",)  # as given, and resolved
    assert {k: v for k, v in settings[0].items() if k not in changing} == {
        k: v for k, v in settings[1].items() if k not in changing
    }


def test_a_dry_run_writes_nothing(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    plan = run_sft(tiny_model, data, tmp_path / "out", dry_run=True)
    assert plan["steps"] == 7
    assert not (tmp_path / "out").exists()


def test_another_run_s_folder_is_refused(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    run_sft(tiny_model, data, tmp_path / "out", max_steps=1)
    before = (tmp_path / "out" / "log.jsonl").read_text()
    with pytest.raises(OutputError, match="holds another run already") as caught:
        run_sft(tiny_model, data, tmp_path / "out", max_steps=1)
    assert f"--out {tmp_path / 'out-2'}" in str(caught.value)
    assert (tmp_path / "out" / "log.jsonl").read_text() == before


def test_this_folder_is_a_place_for_a_run(
    tiny_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run_sft(tiny_model, data, Path("."), max_steps=1)
    assert Path("run.yaml").is_file()
    with pytest.raises(OutputError, match=f"--out {tmp_path / 'here-2'}"):
        run_sft(tiny_model, data, Path("."), max_steps=1)


def test_a_folder_with_something_else_is_refused_and_left_alone(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("dear")
    with pytest.raises(OutputError, match="is no run of truetune, and it is not empty"):
        run_sft(tiny_model, data, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["letter.txt"]


@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_a_file_in_the_way_is_refused(below: str, tiny_model: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="is a file, not a folder"):
        run_sft(tiny_model, data, tmp_path / "file" / below)
    assert (tmp_path / "file").read_text() == "mine"


def test_an_empty_folder_is_as_good_as_none(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert run_sft(tiny_model, data, tmp_path / "out", max_steps=1)["steps"] == 1


def test_a_run_that_never_got_its_model_leaves_no_folder(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(tiny_model, tmp_path / "broken")
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(Exception, match="broken"):
        run_sft(broken, data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_read_only_disk_is_refused_before_anything_is_loaded(
    tiny_model: Path, data: Path, small_disk: Callable[[str], Path]
) -> None:
    disk = small_disk("size=1m")
    small_disk("ro")
    with pytest.raises(OutputError, match=r"can't be written: Read-only file system"):
        run_sft(tiny_model, data, disk / "out")


def test_a_disk_that_fills_up_keeps_what_was_whole_and_the_run_goes_on_once_there_is_space(
    tiny_model: Path, data: Path, tmp_path: Path, small_disk: Callable[[str], Path]
) -> None:
    flags = {"save_every": 1, "keep": 100, "dropout": 0.1}
    run_sft(tiny_model, data, tmp_path / "whole", **flags)
    one = sum(p.stat().st_size for p in (tmp_path / "whole" / "checkpoints" / "step-000001").rglob("*") if p.is_file())
    disk = small_disk(f"size={int(one * 3.5) // 4096 * 4 + 64}k")
    with pytest.raises(OutputError, match="is full") as caught:
        run_sft(tiny_model, data, disk / "out", **flags)
    assert caught.value.exit_code == 2
    assert "--resume auto" in str(caught.value)
    kept = checkpoints(disk / "out")
    assert len(kept) >= 1
    assert all(is_valid(disk / "out" / "checkpoints" / name) for name in kept)
    small_disk("size=64m")
    run_sft(tiny_model, data, disk / "out", resume="auto", **flags)
    assert differences(tmp_path / "whole", disk / "out") == []


def test_a_full_disk_under_the_log_is_one_clear_error(small_disk: Callable[[str], Path]) -> None:
    disk = small_disk("size=64k")

    def write_on() -> None:
        with RunLog(disk / "log.jsonl", Screen(), steps=10_000, start=0, every=1) as run_log:
            for step in range(10_000):
                run_log.step(step + 1, {"loss": 1.0, "tokens": 1, "peak_mb": 1.0})

    with pytest.raises(OutputError, match="is full"):
        write_on()
    lines = (disk / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines[:-1]] == list(range(1, len(lines)))


def test_the_result_of_full_tuning_is_a_model(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    run_sft(tiny_model, data, tmp_path / "out", method="full", lr=1e-2)
    base, tuned = (load_file(f / "model.safetensors") for f in (tiny_model, tmp_path / "out" / "model"))
    assert base.keys() == tuned.keys()
    assert any(not (base[k] == tuned[k]).all() for k in base)


def test_what_was_cut_off_is_in_the_report(tiny_model: Path, tmp_path: Path) -> None:
    data, held = write_rows(tmp_path / "rows.jsonl"), tmp_path / "held.jsonl"
    long = json.dumps({"instruction": "long", "output": "x" * 300}) + "\n"
    data.write_text(data.read_text() + long + long)
    held.write_text(long)
    flags = {"val_data": (str(held),), "max_length": 128, "max_steps": 1}
    run_sft(tiny_model, data, tmp_path / "out", on_overlong="truncate", **flags)
    report = json.loads((tmp_path / "out" / "data" / "report.json").read_text())
    lost = report["held_out"]["truncated"]["tokens"]
    assert lost > 172
    assert report["held_out"]["truncated"] == {"rows": 1, "tokens": lost, "without_stop": 1}
    assert report["truncated"] == {"rows": 2, "tokens": 2 * lost, "without_stop": 2}
    assert (report["read"], report["used"], report["rejected"]) == (16, 16, {})
    run_sft(tiny_model, data, tmp_path / "whole", max_length=256, on_overlong="drop", max_steps=1)
    report = json.loads((tmp_path / "whole" / "data" / "report.json").read_text())
    assert (report["truncated"], report["rejected"]) == (
        {"rows": 0, "tokens": 0, "without_stop": 0},
        {"over_length": 2},
    )


def test_held_out_rows_that_are_trained_on_are_said(
    tiny_model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held, rows = tmp_path / "held.jsonl", data.read_text().splitlines(keepends=True)
    held.write_text("".join(rows[:2]) + json.dumps({"instruction": "new", "output": "row"}) + "\n")
    run_sft(tiny_model, data, tmp_path / "out", val_data=(str(held),), max_steps=1)
    said = " ".join(capsys.readouterr().err.split())
    assert "2 of 3 rows of --val-data are trained on too" in said
