"""The header of a safetensors file: which tensors, where; read with every claim checked, and laid out for writing.

https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from truetune.errors import ModelError

if TYPE_CHECKING:  # a header can be read, and a file copied, without torch: it takes two seconds to import
    import torch

MAX_HEADER_BYTES = 100_000_000  # the library's own limit; a garbage length must not become an allocation

CODES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U64": ("uint64", 8),
    "U32": ("uint32", 4),
    "U16": ("uint16", 2),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
    "C64": ("complex64", 8),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
}
"""What a header calls a dtype → torch's name, and the bytes of one number."""
_CODE_OF = {name: code for code, (name, _) in CODES.items()}


def dtype_of(code: str) -> torch.dtype:
    """Torch's dtype for one of ``CODES``."""
    import torch

    found = getattr(torch, CODES[code][0])
    assert isinstance(found, torch.dtype)
    return found


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: ``nbytes`` bytes of ``file``, from ``offset`` on; ``code`` is one of ``CODES``."""

    name: str
    code: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    @property
    def dtype(self) -> torch.dtype:
        """As torch calls it."""
        return dtype_of(self.code)


@dataclass(frozen=True, slots=True, init=False)
class PlannedTensor:
    """A tensor that will be written: all that a header says of it.

    Raises:
        ValueError: a dtype that safetensors has no code for.
    """

    name: str
    code: str
    shape: tuple[int, ...]

    def __init__(self, name: str, dtype: torch.dtype | str, shape: tuple[int, ...]) -> None:
        code = dtype if isinstance(dtype, str) else _CODE_OF.get(str(dtype).removeprefix("torch."), "")
        if code not in CODES:
            raise ValueError(f"safetensors can't hold {name!r} as {dtype}")
        for field, value in (("name", name), ("code", code), ("shape", shape)):
            object.__setattr__(self, field, value)

    @property
    def dtype(self) -> torch.dtype:
        """As torch calls it."""
        return dtype_of(self.code)

    @property
    def itemsize(self) -> int:
        """Bytes of one number."""
        return CODES[self.code][1]

    @property
    def nbytes(self) -> int:
        """The size of its body in the file."""
        return math.prod(self.shape) * self.itemsize


def header_bytes(shard: Sequence[PlannedTensor]) -> bytes:
    """The first bytes of a file that will hold ``shard``: length, JSON, padding.

    Raises:
        ValueError: a name that safetensors can't hold.
    """
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in shard:
        if tensor.name == "__metadata__":
            raise ValueError(f"safetensors can't hold a tensor called {tensor.name!r}")
        offsets = [offset, offset + tensor.nbytes]
        fields[tensor.name] = {"dtype": tensor.code, "shape": list(tensor.shape), "data_offsets": offsets}
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
    if field["dtype"] not in CODES:
        raise damaged(
            path, f"{name} has an unknown dtype", ", ".join(CODES), field["dtype"], "convert it to one of these"
        )
    planned = PlannedTensor(name, field["dtype"], shape)
    if planned.nbytes != end - begin:
        raise ValueError(f"{name}: {end - begin} bytes where its dtype and shape take {planned.nbytes}")
    return TensorEntry(name, planned.code, shape, path, start + begin, planned.nbytes)


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
