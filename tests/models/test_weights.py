"""Which weight files count, and how a base is known again."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from truetune.checkpoint.tensors import open_index
from truetune.errors import ModelError
from truetune.models.weights import check_weights, fingerprint, weight_files, weight_hash


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRUETUNE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}", encoding="utf-8")
    return folder


def age(path: Path, seconds: int = 60) -> None:
    """As if last changed a while ago."""
    os.utime(path, (path.stat().st_mtime - seconds,) * 2)


def test_a_single_file_goes_before_an_index_for_everybody(folder: Path) -> None:
    """As in transformers; two opinions would hash other weights than are merged."""
    save_file({"a": torch.zeros(2)}, folder / "model.safetensors")
    save_file({"a": torch.ones(2)}, folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    assert weight_files(folder) == [folder / "model.safetensors"]
    assert open_index(folder)["a"].file == folder / "model.safetensors"


def test_an_index_that_is_none_is_refused(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("[", encoding="utf-8")
    with pytest.raises(ModelError, match=r"index\.json: not an index"):
        check_weights(folder)


@pytest.mark.parametrize("change", ["size", "content"])
def test_pickled_weights_count_for_the_identity(folder: Path, change: str) -> None:
    path = folder / "pytorch_model.bin"
    path.write_bytes(bytes(1000))
    before = fingerprint(folder), weight_hash(folder)
    path.write_bytes(bytes(1001) if change == "size" else bytes(999) + b"x")
    age(path, -1)
    after = fingerprint(folder), weight_hash(folder)
    assert all(one and one != other for one, other in zip(before, after, strict=True))


def test_a_hash_is_kept_until_the_file_changes(folder: Path, tmp_path: Path) -> None:
    path = folder / "model.safetensors"
    save_file({"a": torch.zeros(2)}, path)
    age(path)
    first = weight_hash(folder)
    (kept,) = (tmp_path / "cache" / "weights").iterdir()
    assert kept.read_text(encoding="ascii") == first
    kept.write_text("0" * 64, encoding="ascii")
    assert weight_hash(folder) == "0" * 64
    save_file({"a": torch.ones(2)}, path)
    assert weight_hash(folder) not in (first, "0" * 64)


def test_a_file_that_was_just_written_is_not_trusted_to_stay(folder: Path, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, folder / "model.safetensors")
    assert weight_hash(folder)
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_can_not_be_written_does_not_matter(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("in the way", encoding="utf-8")
    save_file({"a": torch.zeros(2)}, folder / "model.safetensors")
    age(folder / "model.safetensors")
    assert weight_hash(folder) == weight_hash(folder) != ""


def test_half_a_checkpoint_has_no_hash(folder: Path) -> None:
    index = {"weight_map": {"a": "model-1.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    assert weight_hash(folder) == ""
