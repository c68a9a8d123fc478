"""Tensors on disk, one at a time: read and write safetensors checkpoints in memory that doesn't grow with the model.

The safetensors library maps whole files (mapped pages count as resident and stay) and writes from a dict that holds
every tensor. Here a header is read into entries, an entry is read with a plain ``read`` when it is wanted, and a
writer that knows all names, dtypes and shapes beforehand lays out each file first and fills in the bodies as they
come. The files are those the library would read and write: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from truetune.errors import ModelError, OutputError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CHUNK_BYTES = 4 << 20
MAX_HEADER_BYTES = 100_000_000  # the library's own limit; a garbage length must not become an allocation

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: ``nbytes`` bytes of ``file``, from ``offset`` on."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor that will be written: all that a header says of it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The size of its body in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def open_index(folder: Path) -> dict[str, TensorEntry]:
    """Every tensor of a model folder, by name, in the order of the files; only headers are read.

    ``model.safetensors`` goes before an index, as in transformers. A tensor that a shard holds and the index leaves
    out is listed too, because transformers would load it.

    Raises:
        ModelError: no safetensors here, a shard is missing or damaged, or the index names what no shard holds.
    """
    if (folder / SINGLE).is_file():
        return _read_header(folder / SINGLE)
    if not (folder / INDEX).is_file():
        raise _no_weights(folder)
    weight_map = _read_weight_map(folder / INDEX)
    shards = sorted(set(weight_map.values()))
    if absent := [shard for shard in shards if not (folder / shard).is_file()]:
        found = f"{len(shards) - len(absent)} of {len(shards)} shards"
        raise ModelError(
            f"{folder}: {len(absent)} of the shards that {INDEX} names are missing",
            ("missing", _few(absent)),
            ("found", found),
            ("way out", "download the missing files again"),
        )
    entries: dict[str, TensorEntry] = {}
    for shard in shards:
        held = _read_header(folder / shard)
        entries |= {name: entry for name, entry in held.items() if weight_map.get(name, shard) == shard}
    if lost := [f"{name} (in {shard})" for name, shard in weight_map.items() if name not in entries]:
        raise ModelError(
            f"{folder / INDEX}: names {len(lost)} tensors that their shards don't hold",
            ("missing", _few(lost)),
            ("way out", "download the index and the shards again, from the same revision"),
        )
    return entries


def load(entry: TensorEntry) -> Tensor:
    """Read exactly this tensor's bytes into memory of its own.

    Raises:
        ModelError: the file is gone, can't be read, or has become shorter.
    """
    raw = torch.empty(entry.nbytes, dtype=torch.uint8)
    with _reading(entry) as file:
        _fill(entry, file, raw.numpy().data)
    return raw.view(entry.dtype).reshape(entry.shape)


def copy_bytes(entry: TensorEntry, out_file: BinaryIO) -> None:
    """Copy this tensor's bytes to where ``out_file`` stands, a few MiB at a time.

    Raises:
        ModelError: as ``load``.
        OSError: ``out_file`` can't be written.
    """
    buffer = memoryview(bytearray(min(CHUNK_BYTES, entry.nbytes)))
    with _reading(entry) as file:
        for start in range(0, entry.nbytes, CHUNK_BYTES):
            chunk = buffer[: min(CHUNK_BYTES, entry.nbytes - start)]
            _fill(entry, file, chunk)
            out_file.write(chunk)


def require_space(folder: Path, needed: int) -> None:
    """Refuse before the first byte what can't be finished.

    Raises:
        OutputError: the disk under ``folder`` has less than ``needed`` bytes free.
    """
    if needed > shutil.disk_usage(folder).free:
        raise output_error(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), folder, needed)


def output_error(error: OSError, folder: Path, needed: int) -> OutputError:
    """Word a failed write. ``needed`` is what the whole output takes; call it after removing what was written."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(
            f"{folder}: can't be written: {error.strerror or error}", ("way out", "choose a folder you may write to")
        )
    free = shutil.disk_usage(folder).free
    return OutputError(
        f"{folder}: {'the quota is used up' if error.errno == errno.EDQUOT else 'the disk is too full'}",
        ("needed", f"{needed:,} bytes ({needed / 1e9:.2f} GB)"),
        ("free", f"{free:,} bytes ({free / 1e9:.2f} GB)"),
        ("way out", "free some space, or write to another disk"),
    )


class ShardWriter:
    """Writes a checkpoint whose tensors are known beforehand; the bodies may then come in any order.

    Use it as a context manager: leaving it normally calls ``close``, an exception calls ``abort``. Files carry
    temporary names until ``close``, and any failure removes them all.

    Args:
        folder: exists, and holds no model yet.
        plan: all tensors, in the order they are dealt out to shards.
        max_shard_bytes: a shard is closed before it would exceed this; a larger tensor gets a shard of its own.

    Raises:
        OutputError: a model is there already, too little space, or the folder can't be written.
        ValueError: the plan holds a name twice, or a dtype that safetensors has no code for.
    """

    def __init__(self, folder: Path, plan: Sequence[PlannedTensor], *, max_shard_bytes: int = 5_000_000_000) -> None:
        if there := sorted(path.name for path in folder.glob("model*.safetensors*")):
            raise OutputError(f"{folder}: already holds a model", ("found", _few(there)), ("way out", "a new folder"))
        shards = _deal(plan, max_shard_bytes)
        self._folder = folder
        self._files: dict[Path, Path] = {}  # temporary -> final name
        self._places: dict[str, tuple[PlannedTensor, Path, int]] = {}  # what is still to come, and where it goes
        self._weight_map: dict[str, str] = {}
        self._total_size = sum(tensor.nbytes for tensor in plan)
        self._open = True
        headers = [_header(shard) for shard in shards]
        self._needed = self._total_size + sum(map(len, headers))
        require_space(folder, self._needed)
        for number, (shard, header) in enumerate(zip(shards, headers, strict=True), start=1):
            name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            self._start(name, shard, header)

    def _start(self, name: str, shard: list[PlannedTensor], header: bytes) -> None:
        path = self._temporary(name)
        offset = len(header)
        for tensor in shard:
            self._places[tensor.name] = (tensor, path, offset)
            self._weight_map[tensor.name] = name
            offset += tensor.nbytes
        with self._guard(), path.open("xb") as file:
            file.write(header)
            file.truncate(offset)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the body of ``name``; dtype and shape must be the planned ones.

        Raises:
            OutputError: the disk is full or not writable.
            ValueError: not planned, written before, or of another dtype or shape.
        """
        with self._body(name, tensor.dtype, tuple(tensor.shape)) as file:
            flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            file.write(flat.numpy().data)

    def write_from(self, entry: TensorEntry) -> None:
        """Copy the body of ``entry.name`` from another checkpoint without holding it.

        Raises:
            ModelError: the source can't be read.
            OutputError, ValueError: as ``write``.
        """
        with self._body(entry.name, entry.dtype, entry.shape) as file:
            copy_bytes(entry, file)

    def close(self) -> None:
        """Bring everything to disk and give the files their names, the index last.

        Raises:
            OutputError: the disk is full or not writable.
            ValueError: some planned tensors were never written.
        """
        if not self._open:
            return
        with self._guard():
            if self._places:
                raise ValueError(f"{len(self._places)} planned tensors were not written: {_few(list(self._places))}")
            if len(self._files) > 1:
                index = {"metadata": {"total_size": self._total_size}, "weight_map": self._weight_map}
                text = json.dumps(index, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
                self._temporary(INDEX).write_text(text, encoding="utf-8")
            for temporary in self._files:
                with temporary.open("rb+") as file:
                    os.fsync(file.fileno())
            for temporary, final in self._files.items():
                temporary.rename(final)
            sync_folder(self._folder)
        self._open = False

    def abort(self) -> None:
        """Remove whatever was written. Does nothing after ``close``."""
        if self._open:
            self._open = False
            for temporary, final in self._files.items():
                ours = temporary if temporary.exists() else final
                with contextlib.suppress(OSError):  # a disk that refuses this too is reported by what came before
                    ours.unlink(missing_ok=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close() if kind is None else self.abort()

    def _temporary(self, name: str) -> Path:
        path = self._folder / f".{name}.{os.getpid()}.partial"
        self._files[path] = self._folder / name
        return path

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.abort()
            raise output_error(error, self._folder, self._needed) from error
        except BaseException:
            self.abort()
            raise

    @contextlib.contextmanager
    def _body(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Iterator[BinaryIO]:
        with self._guard():
            if not self._open or name not in self._places:
                raise ValueError(f"{name!r} is not expected: not planned, written before, or the writer is closed")
            planned, path, offset = self._places[name]
            if (dtype, shape) != (planned.dtype, planned.shape):
                raise ValueError(f"{name!r} is {dtype} {shape}, planned was {planned.dtype} {planned.shape}")
            with path.open("rb+") as file:
                file.seek(offset)
                yield file
            del self._places[name]


def sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` survive a power cut, where the system lets a folder be synced."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _deal(plan: Sequence[PlannedTensor], max_shard_bytes: int) -> list[list[PlannedTensor]]:
    """Cut the plan into shards; within one, wide dtypes come first, so that every body is aligned as the library's."""
    if len({tensor.name for tensor in plan}) < len(plan):
        raise ValueError("the plan holds a name twice")
    shards: list[list[PlannedTensor]] = [[]]
    size = 0
    for tensor in plan:
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return [sorted(shard, key=lambda tensor: -tensor.dtype.itemsize) for shard in shards]


def _header(shard: Sequence[PlannedTensor]) -> bytes:
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in shard:
        if tensor.dtype not in _CODES or tensor.name == "__metadata__":
            raise ValueError(f"safetensors can't hold {tensor.name!r} as {tensor.dtype}")
        offsets = [offset, offset + tensor.nbytes]
        fields[tensor.name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        offset += tensor.nbytes
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that the bodies start at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def _read_header(path: Path) -> dict[str, TensorEntry]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            first = file.read(8)
            length = int.from_bytes(first, "little")
            raw = file.read(length) if len(first) == 8 and length <= min(size - 8, MAX_HEADER_BYTES) else None
    except OSError as error:
        raise ModelError(f"{path}: can't be read: {error.strerror or error}") from error
    if first == b"version ":
        raise _damaged(path, "a Git LFS pointer, not the weights", way_out="git lfs pull")
    if raw is None:
        raise _damaged(path, "not a safetensors header", f"a header of {length:,} bytes", f"a file of {size:,} bytes")
    try:
        fields = json.loads(raw)
        fields.pop("__metadata__", None)
        entries = [_entry(name, field, path, 8 + length) for name, field in fields.items()]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _damaged(path, "the header is garbage", "a JSON object of tensors", str(error)) from error
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
    _check_bodies(path, entries, 8 + length, size)
    return {entry.name: entry for entry in entries}


def _entry(name: str, field: dict[str, Any], path: Path, start: int) -> TensorEntry:
    begin, end = field["data_offsets"]
    shape = tuple(field["shape"])
    if not all(type(number) is int and number >= 0 for number in (begin, end, *shape)):
        raise ValueError(f"{name}: shape {shape}, bytes {begin} to {end}")
    if field["dtype"] not in DTYPES:
        raise _damaged(
            path, f"{name} has an unknown dtype", ", ".join(DTYPES), field["dtype"], "convert it to one of these"
        )
    planned = PlannedTensor(name, DTYPES[field["dtype"]], shape)
    if planned.nbytes != end - begin:
        raise ValueError(f"{name}: {end - begin} bytes where its dtype and shape take {planned.nbytes}")
    return TensorEntry(name, planned.dtype, shape, path, start + begin, planned.nbytes)


def _check_bodies(path: Path, entries: Sequence[TensorEntry], start: int, size: int) -> None:
    """The bodies, given in file order, must fill the file to its end, without holes or overlaps."""
    position = start
    for entry in entries:
        if entry.offset != position:
            raise _damaged(
                path, f"hole or overlap before {entry.name}", f"offset {position:,}", f"offset {entry.offset:,}"
            )
        position += entry.nbytes
    if position != size:
        what = "cut off" if size < position else "longer than its header says"
        raise _damaged(path, what, f"{position:,} bytes", f"{size:,} bytes")


def _read_weight_map(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        # A plain file name only: an index must not send us to read elsewhere.
        well_formed = all(isinstance(shard, str) and Path(shard).name == shard for shard in weight_map.values())
    except OSError as error:
        raise ModelError(f"{path}: can't be read: {error.strerror or error}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _damaged(path, "not an index", 'a JSON object with "weight_map"', str(error)) from error
    if not well_formed or not weight_map:
        raise _damaged(path, "not an index", "tensor names, each with a file of this folder", _few(weight_map.values()))
    return dict(weight_map)


@contextlib.contextmanager
def _reading(entry: TensorEntry) -> Iterator[BinaryIO]:
    try:
        file = entry.file.open("rb", buffering=0)
    except OSError as error:
        raise ModelError(f"{entry.file}: can't be read: {error.strerror or error}") from error
    with file:
        file.seek(entry.offset)
        yield file


def _fill(entry: TensorEntry, file: BinaryIO, into: memoryview) -> None:
    done = 0
    while done < len(into):
        try:
            count = file.readinto(into[done:])  # type: ignore[attr-defined]  # may be short: one call reads 2 GiB at most
        except OSError as error:
            raise ModelError(f"{entry.file}: can't be read: {error.strerror or error}") from error
        if not count:
            raise _damaged(entry.file, f"ends inside {entry.name}", f"{len(into):,} bytes more", f"{done:,}")
        done += count


def _few(names: Iterable[object]) -> str:
    listed = [str(name) for name in names]
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")


def _damaged(path: Path, what: str, expected: str = "", found: str = "", way_out: str = "") -> ModelError:
    notes = (("expected", expected), ("found", found), ("way out", way_out or "download or copy the file again"))
    return ModelError(f"{path}: {what}", *notes)


def _no_weights(folder: Path) -> ModelError:
    legacy = [path.name for path in sorted(folder.glob("pytorch_model*.bin*"))]
    if not legacy:
        what = "holds no weights" if folder.is_dir() else "no such folder"
        return ModelError(f"{folder}: {what}", ("expected", f"{SINGLE}, or {INDEX} and its shards"))
    convert = (
        'convert it: python -c "from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained('{folder}', dtype='auto').save_pretrained('{folder.resolve().name}-safetensors')\""
        " and copy the tokenizer's files beside it"
    )
    return ModelError(f"{folder}: the weights are pickled", ("found", _few(legacy)), ("way out", convert))
