"""What a run leaves, whatever became of its data while it was training."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from training_runs import same_tensors, write_rows
from truetune.config.resolve import resolve
from truetune.config.sft import SFTConfig
from truetune.recipes.data import Prepared, prepare_sft
from truetune.recipes.training import run_training


def run(model: Path, data: Path, out: Path, *, once_read: Callable[[], object] = lambda: None) -> dict[str, str | None]:
    """The hashes in the card of a run to whose data something happens behind its reading."""

    def prepare(*given: Any, **more: Any) -> Prepared:
        made = prepare_sft(*given, **more)
        once_read()
        return made

    flags = {"model": str(model), "data": (str(data),), "out": str(out), "max_steps": 2, "batch_size": 4}
    run_training(resolve(SFTConfig, file=None, flags=flags), prepare)
    hashes: dict[str, str | None] = json.loads((out / "adapter" / "truetune.json").read_text())["data"]["files"]
    return hashes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "rows"
    path.mkdir()
    for name in ("a", "b"):
        write_rows(path / f"{name}.jsonl")
    return path


def test_a_result_names_its_data_by_hash(tiny_model: Path, folder: Path, tmp_path: Path) -> None:
    expected = {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}
    assert run(tiny_model, folder, tmp_path / "out") == expected


@pytest.mark.parametrize("gone", ["file", "one of a folder", "folder"])
def test_a_run_whose_data_is_gone_at_its_end_keeps_what_it_trained(
    gone: str, tiny_model: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = folder / "b.jsonl" if gone == "file" else folder
    run(tiny_model, data, tmp_path / "kept")
    remove = (lambda: shutil.rmtree(folder)) if gone == "folder" else (folder / "b.jsonl").unlink
    hashes = run(tiny_model, data, tmp_path / "out", once_read=remove)
    assert same_tensors(*(tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("kept", "out")))
    lost = [name for name, digest in hashes.items() if digest is None]
    assert lost == [str(folder / name) for name in (["a.jsonl", "b.jsonl"] if gone == "folder" else ["b.jsonl"])]
    said, report = capsys.readouterr().err, (tmp_path / "out" / "report.md").read_text()
    for name in lost:
        assert f"warning {name}: no longer to be read (No such file or directory)" in said
        assert f"- from `{name}` with sha256 (not known)" in report
