"""Token sets that are files: as large as the disk, a few MB of them in memory at a time.

A set is five flat files in one folder, in the machine's own byte order: the tensors of ``TokenSet`` one after another,
and the file and row that each example came from.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import overload

import torch
from torch import Tensor

from truetune.data.schema import Origin
from truetune.data.token_set import TokenSet

PARTS = {
    "tokens": torch.int32,
    "trained": torch.bool,
    "offsets": torch.int64,
    "files": torch.int32,
    "rows": torch.int64,
}

# Pages of a file count as the process's own while they are mapped: they are let go after this many examples. Around
# each page that is touched, the system maps 64 KB.
_EXAMPLES = 32
_STRETCH = 1 << 22  # tokens that are looked at in one go
_ROWS = 1 << 14  # and examples


class Origins(Sequence[Origin]):
    """Where examples came from: a number for the file and one for the row, [n] int32 and [n] int64."""

    def __init__(self, names: Sequence[str], files: Tensor, rows: Tensor) -> None:
        self.names, self.files, self.rows = names, files, rows

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Origin: ...
    @overload
    def __getitem__(self, index: slice) -> Origins: ...
    def __getitem__(self, index: int | slice) -> Origin | Origins:
        if isinstance(index, slice):
            return Origins(self.names, self.files[index], self.rows[index])
        return Origin(self.names[int(self.files[index])], int(self.rows[index]))


@dataclass(slots=True)
class MappedSet(TokenSet):
    """A token set whose tensors are views of files.

    Attributes:
        folder, stem: where the files are, and what their names begin with.
        digest: SHA-256 of tokens, flags and offsets.
        pages: the mapped files.
    """

    folder: Path = Path()
    stem: str = ""
    digest: str = ""
    pages: tuple[mmap.mmap, ...] = ()
    _used: int = field(default=0, repr=False)

    def example(self, index: int) -> tuple[Tensor, Tensor]:
        """As ``TokenSet.example``; now and then the pages of earlier ones are let go, and found again when needed."""
        self._used += 1
        if self._used % _EXAMPLES == 0:
            self.let_go()
        # Named in full: a class with slots is made twice, and the short form of ``super`` knows the first.
        return TokenSet.example(self, index)

    def between(self, first: int, last: int) -> TokenSet:
        """As ``TokenSet.between``; the pages of what was looked at before are let go."""
        self.let_go()
        return TokenSet.between(self, first, last)

    def let_go(self) -> None:
        """Give the pages back to the system, which keeps what it has room for."""
        if hasattr(mmap, "MADV_DONTNEED"):
            for pages in self.pages:
                pages.madvise(mmap.MADV_DONTNEED)

    def trained_count(self) -> int:
        """As ``TokenSet.trained_count``."""
        total = 0
        for start in range(0, len(self), _ROWS):
            offsets = self.offsets[start : start + _ROWS + 1]
            flags, first = self.trained[offsets[0] : offsets[-1]], offsets[:-1][offsets.diff() > 0]
            total += int(flags.sum()) - int(flags[first - offsets[0]].sum())
            self.let_go()
        return total

    def highest(self) -> int:
        """As ``TokenSet.highest``."""
        highest = 0
        for start in range(0, len(self.tokens), _STRETCH):
            highest = max(highest, int(self.tokens[start : start + _STRETCH].max()))
            self.let_go()
        return highest

    def files(self) -> list[str]:
        """As ``TokenSet.files``, without a look at each row, and with those of which another set has all examples."""
        return list(self.origins.names) if isinstance(self.origins, Origins) else TokenSet.files(self)

    def gathered(self, parts: Iterable[TokenSet]) -> TokenSet:
        """Written beside this set, under a name of its own."""
        names = self.origins.names if isinstance(self.origins, Origins) else []
        return write_set(self.folder, f"{self.stem}+", parts, names)


class SetWriter:
    """Writes a set piece by piece."""

    def __init__(self, folder: Path, stem: str, names: Sequence[str]) -> None:
        self._folder, self._stem, self._names = folder, stem, names
        self._place = {name: number for number, name in enumerate(names)}
        self._files = {part: (folder / f"{stem}.{part}").open("wb") for part in PARTS}
        self._end = 0
        self._put("offsets", torch.zeros(1, dtype=torch.int64))

    def add(self, part: TokenSet) -> None:
        """The next examples."""
        self._put("tokens", part.tokens)
        self._put("trained", part.trained)
        self._put("offsets", part.offsets[1:] - part.offsets[0] + self._end)
        self._end += len(part.tokens)
        self._put("files", torch.tensor([self._place[origin.file] for origin in part.origins], dtype=torch.int32))
        self._put("rows", torch.tensor([origin.row for origin in part.origins], dtype=torch.int64))

    def close(self) -> MappedSet:
        """The finished set.

        Raises:
            OSError: the disk is full.
        """
        for file in self._files.values():
            file.close()
        return open_set(self._folder, self._stem, self._names)

    def abandon(self) -> None:
        """Close the files, whatever is in them."""
        for file in self._files.values():
            with contextlib.suppress(OSError):
                file.close()

    def _put(self, part: str, values: Tensor) -> None:
        self._files[part].write(values.to(PARTS[part]).contiguous().numpy().data)


def write_set(folder: Path, stem: str, parts: Iterable[TokenSet], names: Sequence[str]) -> MappedSet:
    """A set of all examples of ``parts``; ``names`` are the files that any of them came from."""
    writer = SetWriter(folder, stem, names)
    try:
        for part in parts:
            writer.add(part)
        return writer.close()
    finally:
        writer.abandon()


def open_set(folder: Path, stem: str, names: Sequence[str]) -> MappedSet:
    """Map a set that was written.

    Raises:
        OSError, ValueError: a file is missing, or its size can't be that of a set.
    """
    maps: dict[str, tuple[Tensor, mmap.mmap | None]] = {p: _mapped(folder / f"{stem}.{p}", d) for p, d in PARTS.items()}
    tensors = {part: tensor for part, (tensor, _) in maps.items()}
    offsets = tensors["offsets"]
    ends = len(offsets) and int(offsets[-1]) == len(tensors["tokens"]) == len(tensors["trained"])
    if not ends or not len(offsets) - 1 == len(tensors["files"]) == len(tensors["rows"]):
        raise ValueError(f"{folder / stem}: its files do not fit together")
    return MappedSet(
        tensors["tokens"],
        tensors["trained"],
        offsets,
        Origins(names, tensors["files"], tensors["rows"]),
        folder=folder,
        stem=stem,
        digest=_digest(folder, stem),
        pages=tuple(pages for _, pages in maps.values() if pages is not None),
    )


def _mapped(path: Path, dtype: torch.dtype) -> tuple[Tensor, mmap.mmap | None]:
    size = path.stat().st_size
    if size % dtype.itemsize:
        raise ValueError(f"{path}: {size} bytes")
    if not size:
        return torch.empty(0, dtype=dtype), None
    with path.open("rb") as file:
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it can't be written to: nobody does
        return torch.frombuffer(pages, dtype=dtype), pages


def _digest(folder: Path, stem: str) -> str:
    """What ``TokenSet`` in memory has as its digest, read in stretches."""
    return file_digest(*(folder / f"{stem}.{part}" for part in ("tokens", "trained", "offsets")))


def file_digest(*paths: Path) -> str:
    """SHA-256 of the files' bytes, one file after another."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()
