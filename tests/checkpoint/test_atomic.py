"""Folders and files that exist whole or not at all."""

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from truetune.checkpoint.atomic import MANIFEST, atomic_folder, faults, is_valid, write_text


def saved(path: Path, content: str = "a") -> Path:
    with atomic_folder(path) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "one").write_text(content)
        (folder / "two").write_text("b" * 5000)
    return path


def fail_half_way(path: Path, error: BaseException) -> None:
    with atomic_folder(path) as folder:
        (folder / "one").write_text("new")
        raise error


def test_a_finished_folder_is_valid(tmp_path: Path) -> None:
    assert faults(saved(tmp_path / "x")) == []


@pytest.mark.skipif(os.name != "posix", reason="rights are POSIX's")
def test_files_have_the_rights_of_their_folder_whoever_wrote_them(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with atomic_folder(tmp_path / "x") as folder:
            (folder / "deep").mkdir()
            save_file({"w": torch.zeros(2)}, folder / "deep" / "w.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x" / "deep" / "w.safetensors").stat().st_mode) == 0o640


def test_a_failure_inside_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="half way"):
        fail_half_way(tmp_path / "x", RuntimeError("half way"))
    assert list(tmp_path.iterdir()) == []


def test_a_failure_inside_leaves_what_was_there(tmp_path: Path) -> None:
    saved(tmp_path / "x", "old")
    with pytest.raises(KeyboardInterrupt):
        fail_half_way(tmp_path / "x", KeyboardInterrupt())
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x" / "deep" / "one").read_text() == "old"


def test_a_new_folder_replaces_the_old_as_a_whole(tmp_path: Path) -> None:
    saved(tmp_path / "x")
    with atomic_folder(tmp_path / "x") as folder:
        (folder / "three").write_text("c")
    assert sorted(p.name for p in (tmp_path / "x").iterdir()) == [MANIFEST, "three"]
    assert is_valid(tmp_path / "x")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_nothing_is_there_before_the_end(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "x") as folder:
        (folder / "one").write_text("a")
        assert not (tmp_path / "x").exists()
    assert (tmp_path / "x").exists()


def test_each_fault_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path / "x")
    (path / "deep" / "one").write_text("A")
    (path / "two").unlink()
    assert faults(path) == ["deep/one has another content than when it was saved", "two is missing"]


def test_a_shorter_file_is_told_by_its_size(tmp_path: Path) -> None:
    path = saved(tmp_path / "x")
    (path / "two").write_text("b")
    assert faults(path) == ["two has 1 bytes, expected 5,000"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"files": 3}', '{"files": {"two": {}}}', '{"files": {"two": 1}}']
)
def test_a_manifest_that_is_none_is_a_fault_and_no_crash(text: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "x")
    (path / MANIFEST).write_text(text)
    assert faults(path) == [f"no readable {MANIFEST}"]


def test_a_text_is_replaced_as_a_whole(tmp_path: Path) -> None:
    write_text(tmp_path / "f", "old")
    write_text(tmp_path / "f", "new")
    assert (tmp_path / "f").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
