"""Writes safetensors checkpoints one tensor at a time: all names, dtypes and shapes are known, the bodies come later.

The library writes from a dict that holds every tensor. Here each file is laid out first and filled in as the bodies
come. The files are those the library would write.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from truetune.checkpoint.atomic import sha256
from truetune.checkpoint.disk import require_space, sync, writing
from truetune.checkpoint.header import PlannedTensor, TensorEntry, few, header_bytes
from truetune.checkpoint.tensors import INDEX, SINGLE, copy_bytes
from truetune.errors import OutputError


class ShardWriter:
    """Writes a checkpoint whose tensors are known beforehand; the bodies may then come in any order.

    Use it as a context manager: leaving it normally calls ``close``, an exception calls ``abort``. Files carry
    temporary names until ``close``, and any failure removes them all; an interruption leaves those that ``finished``
    was told of.

    Args:
        folder: exists, and holds no model yet.
        plan: all tensors, in the order they are dealt out to shards.
        max_shard_bytes: a shard is closed before it would exceed this; a larger tensor gets a shard of its own.
        finished: told the name and SHA-256 of each shard as soon as it is whole on disk under its own name, which it
            then has before ``close``.
        kept: names of shards of this very plan that are in the folder already.

    Raises:
        OutputError: a model is there already, too little space, or the folder can't be written.
        ValueError: the plan holds a name twice, or a dtype that safetensors has no code for.
    """

    def __init__(
        self,
        folder: Path,
        plan: Sequence[PlannedTensor],
        *,
        max_shard_bytes: int = 5_000_000_000,
        finished: Callable[[str, str], None] | None = None,
        kept: Collection[str] = (),
    ) -> None:
        if there := sorted(path.name for path in folder.glob("model*.safetensors*") if path.name not in kept):
            raise OutputError(f"{folder}: already holds a model", ("found", few(there)), ("way out", "a new folder"))
        shards = _deal(plan, max_shard_bytes)
        self._folder = folder
        self._files: dict[Path, Path] = {}  # temporary -> final name
        self._places: dict[str, tuple[PlannedTensor, Path, int]] = {}  # what is still to come, and where it goes
        self._weight_map: dict[str, str] = {}
        self._finished = finished
        self._aside = ThreadPoolExecutor(1)  # starts no thread before it has work
        self._digests: dict[Path, _Digest] = {}
        self._left: dict[Path, int] = {}  # bodies that a shard still waits for
        self._total_size = sum(tensor.nbytes for tensor in plan)
        self._open = True
        headers = [header_bytes(shard) for shard in shards]
        self._needed = self._total_size + sum(map(len, headers)) - sum((folder / n).stat().st_size for n in kept)
        require_space(folder, self._needed)
        for number, (shard, header) in enumerate(zip(shards, headers, strict=True), start=1):
            name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            if name in kept:
                self._weight_map |= dict.fromkeys((tensor.name for tensor in shard), name)
            else:
                self._start(name, shard, header)

    def _start(self, name: str, shard: list[PlannedTensor], header: bytes) -> None:
        path = self._temporary(name)
        offset = len(header)
        for tensor in shard:
            self._places[tensor.name] = (tensor, path, offset)
            self._weight_map[tensor.name] = name
            offset += tensor.nbytes
        self._left[path] = len(shard)
        self._digests[path] = _Digest()
        with self._guard(), path.open("xb") as file:
            self._into(path, file, 0).write(header)
            file.truncate(offset)

    def waits_for(self, name: str) -> bool:
        """Whether a planned tensor is still to be written: it is not, in a shard that was kept."""
        return name in self._places

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
                raise ValueError(f"{len(self._places)} planned tensors were not written: {few(list(self._places))}")
            if len(set(self._weight_map.values())) > 1:
                index = {"metadata": {"total_size": self._total_size}, "weight_map": self._weight_map}
                text = json.dumps(index, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
                self._temporary(INDEX).write_text(text, encoding="utf-8")
            waiting = {temporary: final for temporary, final in self._files.items() if temporary.exists()}
            for temporary in waiting:
                sync(temporary)
            for temporary, final in waiting.items():
                temporary.rename(final)
            sync(self._folder)
        self._open = False

    def abort(self, *, interrupted: bool = False) -> None:
        """Remove whatever was written, or only what is not finished. Does nothing after ``close``."""
        if self._open:
            self._open = False
            for temporary, final in self._files.items():
                ours = temporary if temporary.exists() else final
                if ours is final and interrupted and self._finished:
                    continue
                with contextlib.suppress(OSError):  # a disk that refuses this too is reported by what came before
                    ours.unlink(missing_ok=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abort(interrupted=issubclass(kind, KeyboardInterrupt))
        self._aside.shutdown()

    def _temporary(self, name: str) -> Path:
        path = self._folder / f".{name}.{os.getpid()}.partial"
        self._files[path] = self._folder / name
        return path

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        with writing(self._folder, needed=self._needed):
            try:
                yield
            except BaseException as error:
                self.abort(interrupted=isinstance(error, KeyboardInterrupt))
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
                yield self._into(path, file, offset)
            del self._places[name]
            self._left[path] -= 1
            if self._finished and not self._left[path]:
                sync(path)
                path.rename(self._files[path])
                self._finished(self._files[path].name, self._digests.pop(path).of(self._files[path]))

    def _into(self, path: Path, file: BinaryIO, offset: int) -> BinaryIO:
        """The file as it is, or one that hashes what passes where the hashes are wanted."""
        if self._finished is None:
            return file
        return cast(BinaryIO, _Passing(file, self._digests[path], offset, self._aside))


@dataclass
class _Digest:
    """SHA-256 of a file while it is written from front to back; of one written in another order, once it is whole."""

    sha: Any = field(default_factory=hashlib.sha256)
    length: int = 0
    in_order: bool = True

    def add(self, offset: int, data: memoryview | bytes) -> None:
        """What is written at ``offset``."""
        self.in_order = self.in_order and offset == self.length
        if self.in_order:
            self.sha.update(data)
            self.length += len(data)

    def of(self, path: Path) -> str:
        """The digest of the finished file."""
        return str(self.sha.hexdigest()) if self.in_order else sha256(path)


@dataclass
class _Passing:
    """A file's ``write``, with a digest of what passes."""

    file: BinaryIO
    digest: _Digest
    offset: int
    aside: ThreadPoolExecutor

    def write(self, data: memoryview | bytes) -> None:
        """Write all of it; hashing takes as long as writing does, so it is done at the same time."""
        hashed = self.aside.submit(self.digest.add, self.offset, data)
        self.offset += len(data)
        self.file.write(data)
        hashed.result()


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
