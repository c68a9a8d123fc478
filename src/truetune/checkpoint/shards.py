"""Writes safetensors checkpoints one tensor at a time: all names, dtypes and shapes are known, the bodies come later.

The library writes from a dict that holds every tensor. Here each file is laid out first and filled in as the bodies
come. The files are those the library would write.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from truetune.checkpoint.bodies import Body, Digest, Fill, Hashing
from truetune.checkpoint.disk import require_space, reserve, sync, writing
from truetune.checkpoint.header import PlannedTensor, TensorEntry, few, header_bytes
from truetune.checkpoint.tensors import INDEX, SINGLE, reading
from truetune.errors import OutputError

if TYPE_CHECKING:
    from torch import Tensor


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
        self._hashing = Hashing()
        self._digests: dict[Path, Digest] = {}  # where the hashes are wanted
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
        if self._finished is not None:
            self._digests[path] = Digest()
        with self._guard(), path.open("xb", buffering=0) as file:
            reserve(file.fileno(), offset)
            self._into(path, file, 0).write(header)

    def waits_for(self, name: str) -> bool:
        """Whether a planned tensor is still to be written: it is not, in a shard that was kept."""
        return name in self._places

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the body of ``name``; dtype and shape must be the planned ones.

        Raises:
            OutputError: the disk is full or not writable.
            ValueError: not planned, written before, or of another dtype or shape.
        """
        import torch

        with self._body(PlannedTensor(name, tensor.dtype, tuple(tensor.shape))) as body:
            flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            body.write(flat.numpy().data)

    def write_from(self, entry: TensorEntry) -> None:
        """Copy the body of ``entry.name`` from another checkpoint without holding it.

        Raises:
            ModelError: the source can't be read.
            OutputError, ValueError: as ``write``.
        """
        with reading(entry) as fill:
            self.write_pieces(PlannedTensor(entry.name, entry.code, entry.shape), fill)

    def write_pieces(self, tensor: PlannedTensor, fill: Fill, *, unit: int = 1) -> None:
        """Write a body that is made piece by piece.

        Args:
            unit: pieces are multiples of so many bytes, such as those of a row.
        Raises:
            OutputError, ValueError: as ``write``.
        """
        with self._body(tensor) as body:
            body.fill(tensor.nbytes, fill, unit=unit)

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
        self._hashing.close()

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
    def _body(self, tensor: PlannedTensor) -> Iterator[Body]:
        name = tensor.name
        with self._guard():
            if not self._open or name not in self._places:
                raise ValueError(f"{name!r} is not expected: not planned, written before, or the writer is closed")
            planned, path, offset = self._places[name]
            if tensor != planned:
                found = f"{tensor.dtype} {tensor.shape}"
                raise ValueError(f"{name!r} is {found}, planned was {planned.dtype} {planned.shape}")
            with path.open("rb+", buffering=0) as file:
                file.seek(offset)
                yield self._into(path, file, offset)
            del self._places[name]
            self._left[path] -= 1
            if self._finished and not self._left[path]:
                sync(path)
                self._hashing.settle()
                path.rename(self._files[path])
                self._finished(self._files[path].name, self._digests.pop(path).of(self._files[path]))

    def _into(self, path: Path, file: BinaryIO, offset: int) -> Body:
        return Body(file, offset, self._hashing, self._digests.get(path))


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
    return [sorted(shard, key=lambda tensor: -tensor.itemsize) for shard in shards]
