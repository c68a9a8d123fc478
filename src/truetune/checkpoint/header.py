"""The header of a safetensors file: which tensors, where; read with every claim checked, and laid out for writing.

https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from truetune.errors import ModelError

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


def header_bytes(shard: Sequence[PlannedTensor]) -> bytes:
    """The first bytes of a file that will hold ``shard``: length, JSON, padding.

    Raises:
        ValueError: a dtype or name that safetensors can't hold.
    """
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


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Every tensor of one file, in the order of their bodies.

    Raises:
        ModelError: unreadable, cut off, or no safetensors file; what is wrong and what was expected.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            first = file.read(8)
            length = int.from_bytes(first, "little")
            raw = file.read(length) if len(first) == 8 and length <= min(size - 8, MAX_HEADER_BYTES) else None
    except OSError as error:
        raise ModelError(f"{path}: can't be read: {error.strerror or error}") from error
    if first == b"version ":
        raise damaged(path, "a Git LFS pointer, not the weights", way_out="git lfs pull")
    if raw is None:
        raise damaged(path, "not a safetensors header", f"a header of {length:,} bytes", f"a file of {size:,} bytes")
    try:
        fields = json.loads(raw)
        fields.pop("__metadata__", None)
        entries = [_entry(name, field, path, 8 + length) for name, field in fields.items()]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise damaged(path, "the header is garbage", "a JSON object of tensors", str(error)) from error
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
    _check_bodies(path, entries, 8 + length, size)
    return {entry.name: entry for entry in entries}


def _entry(name: str, field: dict[str, Any], path: Path, start: int) -> TensorEntry:
    begin, end = field["data_offsets"]
    shape = tuple(field["shape"])
    if not all(type(number) is int and number >= 0 for number in (begin, end, *shape)):
        raise ValueError(f"{name}: shape {shape}, bytes {begin} to {end}")
    if field["dtype"] not in DTYPES:
        raise damaged(
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
            raise damaged(
                path, f"hole or overlap before {entry.name}", f"offset {position:,}", f"offset {entry.offset:,}"
            )
        position += entry.nbytes
    if position != size:
        what = "cut off" if size < position else "longer than its header says"
        raise damaged(path, what, f"{position:,} bytes", f"{size:,} bytes")


def few(names: Iterable[object]) -> str:
    """The first five names, and how many more there are."""
    listed = [str(name) for name in names]
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")


def damaged(path: Path, what: str, expected: str = "", found: str = "", way_out: str = "") -> ModelError:
    """The error for a file that is not what it should be."""
    notes = (("expected", expected), ("found", found), ("way out", way_out or "download or copy the file again"))
    return ModelError(f"{path}: {what}", *notes)
