"""Tensors on disk: what is written is what the safetensors library reads, and damage is named before it is loaded."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors
import torch
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torch import Tensor

from truetune.checkpoint.bodies import PIECE_BYTES
from truetune.checkpoint.disk import require_space
from truetune.checkpoint.header import CODES, PlannedTensor, dtype_of
from truetune.checkpoint.shards import ShardWriter
from truetune.checkpoint.tensors import load, open_index
from truetune.errors import ModelError, OutputError


def planned(tensors: dict[str, Tensor]) -> list[PlannedTensor]:
    return [PlannedTensor(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


def write_all(folder: Path, tensors: dict[str, Tensor], max_shard_bytes: int = 5_000_000_000) -> None:
    folder.mkdir(exist_ok=True)
    with ShardWriter(folder, planned(tensors), max_shard_bytes=max_shard_bytes) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def same_bits(left: Tensor, right: Tensor) -> bool:
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    return torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))


def known_to_the_library(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The library reads and writes complex numbers since 0.7."""
    if Version(safetensors.__version__) >= Version("0.7"):
        return tensors
    return {name: tensor for name, tensor in tensors.items() if tensor.dtype != torch.complex64}


def assorted() -> dict[str, Tensor]:
    torch.manual_seed(0)
    tensors = {
        f"{code}.odd": torch.randint(0, 2, (7 * dtype.itemsize,), dtype=torch.uint8).view(dtype)
        for code, dtype in ((code, dtype_of(code)) for code in CODES)
    }
    return tensors | {
        "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 4),
        "byte": torch.tensor([-3], dtype=torch.int8),
        "transposed": torch.randn(3, 5).t(),
        "näme ü": torch.randn(2, 3, 5, dtype=torch.float16),
    }


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three shards of two tensors each."""
    tensors = {f"layer.{n}": torch.full((10,), float(n)) for n in range(6)}
    write_all(tmp_path / "model", tensors, max_shard_bytes=80)
    return tmp_path / "model"


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    tensors = known_to_the_library(assorted())
    write_all(tmp_path, tensors)
    read = load_file(tmp_path / "model.safetensors")
    assert read.keys() == tensors.keys()
    assert [name for name in tensors if not same_bits(read[name], tensors[name])] == []
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_we_read_what_the_library_writes(tmp_path: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in known_to_the_library(assorted()).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    entries = open_index(tmp_path)
    assert entries.keys() == tensors.keys()
    assert [name for name in tensors if not same_bits(load(entries[name]), tensors[name])] == []


def test_we_read_what_we_write(tmp_path: Path) -> None:
    tensors = assorted()
    write_all(tmp_path, tensors)
    entries = open_index(tmp_path)
    assert entries.keys() == tensors.keys()
    assert [name for name in tensors if not same_bits(load(entries[name]), tensors[name])] == []


def test_every_body_is_aligned_to_its_dtype(tmp_path: Path) -> None:
    write_all(tmp_path, assorted())
    assert [e.name for e in open_index(tmp_path).values() if e.offset % e.dtype.itemsize] == []


def test_a_loaded_tensor_owns_its_memory(tmp_path: Path) -> None:
    write_all(tmp_path, {"w": torch.ones(4)})
    entry = open_index(tmp_path)["w"]
    load(entry).zero_()
    assert torch.equal(load(entry), torch.ones(4))


def test_bodies_may_come_in_any_order(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(5.0), "b": torch.arange(3, dtype=torch.int8), "c": torch.arange(4.0)}
    with ShardWriter(tmp_path, planned(tensors)) as writer:
        for name in ("c", "a", "b"):
            writer.write(name, tensors[name])
    read = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("size", [0, 1, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 7 * PIECE_BYTES + 3])
def test_bytes_are_copied_across_the_borders_of_pieces(tmp_path: Path, size: int) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    tensors = {"before": torch.ones(3, dtype=torch.uint8), "w": torch.arange(size).to(torch.uint8)}
    write_all(source, tensors)
    entries = open_index(source)
    out.mkdir()
    with ShardWriter(out, planned(tensors)) as writer:
        for entry in entries.values():
            writer.write_from(entry)
    assert (out / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_shards_are_named_and_indexed_as_transformers_does(shards: Path) -> None:
    names = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert sorted(path.name for path in shards.iterdir()) == [*names, "model.safetensors.index.json"]
    index = json.loads((shards / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 240
    assert index["weight_map"] == {f"layer.{n}": names[n // 2] for n in range(6)}
    for n, entry in enumerate(open_index(shards).values()):
        assert torch.equal(load(entry), torch.full((10,), float(n)))


@pytest.mark.parametrize(("limit", "files"), [(79, 6), (80, 3), (119, 3), (120, 2), (239, 2), (240, 1), (1, 6)])
def test_a_shard_is_full_at_its_limit_and_never_above(tmp_path: Path, limit: int, files: int) -> None:
    write_all(tmp_path, {f"layer.{n}": torch.zeros(10) for n in range(6)}, max_shard_bytes=limit)
    assert len(list(tmp_path.glob("*.safetensors"))) == files


def test_a_tensor_that_the_index_forgets_is_still_listed(shards: Path) -> None:
    index = json.loads((shards / "model.safetensors.index.json").read_text())
    del index["weight_map"]["layer.3"]
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "layer.3" in open_index(shards)


# --- damage -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 39, 80])
def test_a_truncated_shard_is_named_with_both_sizes(shards: Path, cut: int) -> None:
    path = shards / "model-00002-of-00003.safetensors"
    size = path.stat().st_size
    os.truncate(path, size - cut)
    with pytest.raises(ModelError, match=r"00002-of-00003\.safetensors: cut off") as caught:
        open_index(shards)
    assert f"{size:,} bytes" in str(caught.value)
    assert f"{size - cut:,} bytes" in str(caught.value)
    assert "way out" in str(caught.value)


@pytest.mark.parametrize("keep", [0, 5, 8, 60])
def test_a_file_that_ends_in_its_header_is_named(shards: Path, keep: int) -> None:
    path = shards / "model-00002-of-00003.safetensors"
    os.truncate(path, keep)
    with pytest.raises(ModelError, match=f"00002-of-00003.safetensors(.|\n)*{keep} bytes"):
        open_index(shards)


def header(text: str, body: bytes = b"") -> bytes:
    return len(text.encode()).to_bytes(8, "little") + text.encode() + body


@pytest.mark.parametrize(
    "content",
    [
        b"\xff" * 64,
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        b"\x08\0\0\0\0\0\0\0\xff\xfe garbage",
        header("[1, 2]"),
        header('{"w": 3}'),
        header('{"w": {"dtype": "F32", "shape": [1]}}', bytes(4)),
        header('{"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', bytes(4)),
        header('{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', bytes(4)),
        header('{"w": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}', bytes(4)),
        header('{"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}', bytes(8)),
        header('{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', bytes(5)),
        header("[" * 100_000),
    ],
    ids=lambda content: repr(content[8:40]),
)
def test_a_garbage_header_is_an_error_that_names_the_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.safetensors") as caught:
        open_index(tmp_path)
    assert "way out" in str(caught.value)


def test_all_missing_shards_are_listed(shards: Path) -> None:
    for n in (1, 3):
        (shards / f"model-0000{n}-of-00003.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model-00001-of-00003\.safetensors, model-00003-of-00003\.safetensors"):
        open_index(shards)


def test_an_index_that_names_what_its_shard_lacks_is_refused(shards: Path) -> None:
    path = shards / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["layer.9"] = "model-00001-of-00003.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"layer\.9 \(in model-00001-of-00003\.safetensors\)"):
        open_index(shards)


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"weight_map": {}}', '{"weight_map": {"w": "../other.safetensors"}}']
)
def test_a_garbage_index_is_an_error_that_names_the_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json"):
        open_index(tmp_path)


def test_pickled_weights_come_with_the_way_to_convert_them(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"pickled(.|\n)*pytorch_model\.bin(.|\n)*convert it: .*save_pretrained"):
        open_index(tmp_path)


def test_a_folder_without_weights_and_no_folder_at_all_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no weights"):
        open_index(tmp_path)
    with pytest.raises(ModelError, match="no such folder"):
        open_index(tmp_path / "absent")


def test_a_file_that_shrinks_after_it_was_opened_is_noticed(tmp_path: Path) -> None:
    write_all(tmp_path, {"w": torch.ones(100)})
    entry = open_index(tmp_path)["w"]
    os.truncate(entry.file, entry.offset + 40)
    with pytest.raises(ModelError, match="ends inside w"):
        load(entry)


# --- refusals and failures of the writer --------------------------------------------------------------------------


def test_nothing_carries_a_final_name_before_close(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, [PlannedTensor("w", torch.float32, (2,))])
    writer.write("w", torch.ones(2))
    assert list(tmp_path.glob("model*")) == []
    writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("name", "tensor"),
    [("w", torch.ones(3)), ("w", torch.ones(2, dtype=torch.float16)), ("v", torch.ones(2))],
    ids=["shape", "dtype", "name"],
)
def test_a_tensor_that_was_not_planned_so_leaves_nothing_behind(tmp_path: Path, name: str, tensor: Tensor) -> None:
    writer = ShardWriter(tmp_path, [PlannedTensor("w", torch.float32, (2,))])
    with pytest.raises(ValueError, match=f"'{name}' is"):
        writer.write(name, tensor)
    assert list(tmp_path.iterdir()) == []


def test_closing_too_early_names_what_is_missing_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 planned tensors were not written: w"):
        ShardWriter(tmp_path, [PlannedTensor("w", torch.float32, (2,))]).close()
    assert list(tmp_path.iterdir()) == []


def test_an_exception_of_the_caller_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with ShardWriter(tmp_path, [PlannedTensor("w", torch.float32, (2,))]):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_a_model_is_refused_and_kept(shards: Path) -> None:
    before = {path: path.read_bytes() for path in shards.iterdir()}
    with pytest.raises(OutputError, match="already holds a model"):
        ShardWriter(shards, [PlannedTensor("w", torch.float32, (2,))])
    assert {path: path.read_bytes() for path in shards.iterdir()} == before


def test_a_plan_with_a_name_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="twice"):
        ShardWriter(tmp_path, [PlannedTensor("w", torch.float32, (2,))] * 2)


def test_too_little_space_is_refused_before_the_first_byte(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"needed +4,000,000,000,\d+ bytes(.|\n)*free +[\d,]+ bytes"):
        ShardWriter(tmp_path, [PlannedTensor("w", torch.float32, (1_000_000_000_000,))])
    assert list(tmp_path.iterdir()) == []
    require_space(tmp_path, 1)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("a small disk can only be mounted by root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_nobody_else_takes_the_room_that_a_checkpoint_needs(small_disk: Path) -> None:
    big = torch.ones(200_000)
    with ShardWriter(small_disk, planned({"w": big})) as writer:  # 0.8 MB into 1 MiB
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            (small_disk / "other").write_bytes(bytes(500_000))
        writer.write("w", big)
    assert torch.equal(load(open_index(small_disk)["w"]), big)


def test_room_that_goes_between_the_check_and_the_file_is_missed_before_the_first_tensor(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("truetune.checkpoint.shards.require_space", lambda *_: None)
    halves = {name: torch.ones(200_000) for name in "ab"}
    with pytest.raises(OutputError, match=r"is full(.|\n)*needed +1,600,\d+ bytes(.|\n)*free +[\d,]+ bytes"):
        ShardWriter(small_disk, planned(halves), max_shard_bytes=800_000)
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize("how", ["write", "write_from"])
def test_a_disk_that_fills_up_on_the_way_says_so_and_leaves_nothing(
    small_disk: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("truetune.checkpoint.shards.reserve", os.ftruncate)  # as where a disk can't reserve
    big = torch.ones(200_000)
    source = small_disk.parent / "source"
    write_all(source, {"w": big})
    writer = ShardWriter(small_disk, planned({"w": big}))  # 0.8 MB into 1 MiB: it fits when the check is made
    (small_disk / "other").write_bytes(bytes(500_000))
    with pytest.raises(OutputError, match=r"is full(.|\n)*needed +800,\d+ bytes(.|\n)*free +[\d,]+ bytes"):
        writer.write("w", big) if how == "write" else writer.write_from(open_index(source)["w"])
    assert [path.name for path in small_disk.iterdir()] == ["other"]


def test_a_disk_error_that_only_shows_at_the_end_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {"a": torch.ones(4), "b": torch.ones(4)}
    writer = ShardWriter(tmp_path, planned(tensors), max_shard_bytes=16)
    for name, tensor in tensors.items():
        writer.write(name, tensor)

    def full(_: int) -> None:  # a file system with delayed allocation reports a full disk here
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="is full"):
        writer.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes past permission bits")
def test_a_read_only_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="can't be written"):
        ShardWriter(tmp_path, [PlannedTensor("w", torch.float32, (2,))])


def test_a_read_only_disk_is_refused(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(OutputError, match="can't be written: Read-only file system"):
        ShardWriter(small_disk, [PlannedTensor("w", torch.float32, (2,))])
