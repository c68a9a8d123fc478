"""Writes safetensors checkpoints one tensor at a time: all names, dtypes and shapes are known, the bodies come later.

The library writes from a dict that holds every tensor. Here each file is laid out first and filled in as the bodies
come. The files are those the library would write.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from truetune.checkpoint.disk import require_space, sync, writing
from truetune.checkpoint.header import PlannedTensor, TensorEntry, few, header_bytes
from truetune.checkpoint.tensors import INDEX, SINGLE, copy_bytes
from truetune.errors import OutputError


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
            raise OutputError(f"{folder}: already holds a model", ("found", few(there)), ("way out", "a new folder"))
        shards = _deal(plan, max_shard_bytes)
        self._folder = folder
        self._files: dict[Path, Path] = {}  # temporary -> final name
        self._places: dict[str, tuple[PlannedTensor, Path, int]] = {}  # what is still to come, and where it goes
        self._weight_map: dict[str, str] = {}
        self._total_size = sum(tensor.nbytes for tensor in plan)
        self._open = True
        headers = [header_bytes(shard) for shard in shards]
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
                raise ValueError(f"{len(self._places)} planned tensors were not written: {few(list(self._places))}")
            if len(self._files) > 1:
                index = {"metadata": {"total_size": self._total_size}, "weight_map": self._weight_map}
                text = json.dumps(index, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
                self._temporary(INDEX).write_text(text, encoding="utf-8")
            for temporary in self._files:
                sync(temporary)
            for temporary, final in self._files.items():
                temporary.rename(final)
            sync(self._folder)
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
        with writing(self._folder, needed=self._needed):
            try:
                yield
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
