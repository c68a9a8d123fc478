"""Merge into a checkpoint, tensor by tensor: the memory of two weights, whatever the size of the model.

Loading the model, changing it and saving it would hold all of it, and run it through a class that may rename or drop
what it doesn't know. Here the base's own files are the plan: every tensor nobody edits is copied as bytes, an edited
one is read, changed and written, and the result appears under its name only when it is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from truetune.checkpoint.header import PlannedTensor, TensorEntry
from truetune.checkpoint.shards import ShardWriter
from truetune.checkpoint.tensors import load, open_index, reading, weight_files
from truetune.errors import ModelError, nearest
from truetune.export.new_folder import Partial, appearing, check_out, continued, side_contents
from truetune.ops.allocator import return_freed_memory

if TYPE_CHECKING:  # what copies bytes and folds rows in place needs no torch
    import torch
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Edit:
    """A change of one tensor of the base.

    Args:
        name: as the base's files call it.
        apply: pure; from the dense tensor as stored to a new one.
        dtype, shape: what ``apply`` returns if it is not the stored dtype and shape.
    """

    name: str
    apply: Callable[[Tensor], Tensor]
    dtype: torch.dtype | None = None
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class RowEdit:
    """A change of one tensor in place, some rows at a time: dtype and shape stay, and it is never held as a whole.

    Args:
        name: as the base's files call it.
        apply: changes rows as stored; told the number of the first. Called from the first row to the last.
    """

    name: str
    apply: Callable[[int, memoryview], None]


@dataclass(frozen=True, slots=True)
class Addition:
    """A tensor the base doesn't have, such as the head of a model that was tied; made when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


Change = Edit | RowEdit | Addition


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What a merge wrote: tensors by what became of them, bytes of weights, and the files beside them."""

    copied: int
    edited: int
    added: int
    dropped: int
    nbytes: int
    files: tuple[str, ...]
    kept: int = 0  # weight files that an earlier attempt had finished


def merge_checkpoint(
    base: Path,
    out: Path,
    edits: Mapping[str, Change],
    *,
    drop: Collection[str] = (),
    config_updates: Mapping[str, object] | None = None,
    extra_files: Mapping[str, bytes | Path] | None = None,
    max_shard_bytes: int = 5_000_000_000,
    progress: Callable[[int, int], None] | None = None,
    identity: str = "",
) -> MergeReport:
    """Write ``base`` with ``edits`` to the new folder ``out``, holding one changed tensor while the next is made.

    Args:
        edits: by tensor name, the same as in the value. An addition may reuse a dropped name.
        drop: tensors of the base to leave out.
        config_updates: top-level keys of ``config.json`` to set, or with None to remove; a nested value is replaced
            as a whole.
        extra_files: contents (or a file to copy) by name; they go before the base's files of that name.
        progress: called after each tensor with the bytes written so far and in all.
        identity: of what the edits do. With it, weight files that an earlier attempt at the same finished before it was
            killed are kept, and ``MANIFEST.json`` lists every file with its hash.

    Raises:
        ModelError: the base has no readable safetensors weights or config, or lacks a tensor that is edited; or a
            tensor would not be finite.
        OutputError: ``out`` is the base, or not empty, or the disk is full or not writable.
        ValueError: the edits contradict each other, or one returns another shape or dtype than it announced.
    """
    return_freed_memory()
    entries = open_index(base)
    _check_edits(base, entries, edits, drop)
    check_out(base, out)
    files = side_contents(base, config_updates or {}, extra_files or {})
    plan = _plan(entries, edits, drop)
    total = sum(tensor.nbytes for tensor in plan)
    beside = sum(len(content) if isinstance(content, bytes) else content.stat().st_size for content in files.values())
    identity = identity and f"{identity} {max_shard_bytes}"
    with (
        _partial(base, out.resolve(), files, plan, needed=total + beside, identity=identity) as partial,
        ShardWriter(
            partial.path,
            plan,
            max_shard_bytes=max_shard_bytes,
            finished=partial.finished if identity else None,
            kept=partial.kept,
        ) as writer,
    ):
        _write(writer, plan, entries, edits, progress or (lambda done, total: None))
    edited = sum(not isinstance(edit, Addition) for edit in edits.values())
    added = len(edits) - edited
    return MergeReport(
        len(plan) - len(edits), edited, added, len(set(drop)), total, tuple(sorted(files)), len(partial.kept)
    )


def _write(
    writer: ShardWriter,
    plan: Sequence[PlannedTensor],
    entries: Mapping[str, TensorEntry],
    edits: Mapping[str, Change],
    progress: Callable[[int, int], None],
) -> None:
    """Every tensor that an earlier attempt left to be written: made anew, changed as it passes by, or as it is."""
    total, done = sum(tensor.nbytes for tensor in plan), 0
    waiting = [tensor.name for tensor in plan if writer.waits_for(tensor.name)]
    whole = [edits[name] for name in waiting if name in edits]
    made = _made_ahead([edit for edit in whole if not isinstance(edit, RowEdit)], entries)
    for tensor in plan:
        if writer.waits_for(tensor.name):
            edit = edits.get(tensor.name)
            if isinstance(edit, RowEdit):
                _write_by_rows(writer, tensor, entries[tensor.name], edit)
            elif edit is not None:
                writer.write(tensor.name, next(made))
            else:
                writer.write_from(entries[tensor.name])
        done += tensor.nbytes
        progress(done, total)


@contextlib.contextmanager
def _partial(
    base: Path,
    out: Path,
    files: Mapping[str, bytes | Path],
    plan: Sequence[PlannedTensor],
    *,
    needed: int,
    identity: str,
) -> Iterator[Partial]:
    """The folder to write to; one that goes on with an earlier attempt where what is made has an identity."""
    if not identity:
        with appearing(out, files, needed) as path:
            yield Partial(path)
        return
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in weight_files(base)]
    whole = hashlib.sha256(repr((identity, stats, plan)).encode()).hexdigest()
    with continued(out, files, needed, identity=whole) as partial:
        yield partial


def _check_edits(
    base: Path, entries: Mapping[str, TensorEntry], edits: Mapping[str, Change], drop: Collection[str]
) -> None:
    edited = [name for name, edit in edits.items() if not isinstance(edit, Addition)]
    if unknown := [name for name in (*edited, *drop) if name not in entries]:
        # Looking for a neighbour is slow among thousands of names; the first few show what went wrong.
        hints = {name: nearest(name, entries) for name in unknown[:8]}
        lines = [f"{name} (did you mean {hints[name]})" if hints.get(name) else name for name in unknown]
        raise ModelError(
            f"{base}: lacks {len(unknown)} of the {len(edited) + len(drop)} tensors to change",
            ("missing", "\n".join(lines)),
            ("way out", "use the base that the adapter was trained on"),
        )
    for name, edit in edits.items():
        if edit.name != name:
            raise ValueError(f"the edit of {edit.name!r} is filed under {name!r}")
        if not isinstance(edit, Addition) and name in drop:
            raise ValueError(f"{name!r} is both edited and dropped")
        if isinstance(edit, Addition) and name in entries and name not in drop:
            raise ValueError(f"{name!r} is added, but the base has it: edit it, or drop it as well")


def _plan(
    entries: Mapping[str, TensorEntry], edits: Mapping[str, Change], drop: Collection[str]
) -> list[PlannedTensor]:
    """The base's tensors in the order of its files, so that they are read front to back; additions come last."""
    plan = [becomes(entry, edits.get(entry.name)) for entry in entries.values() if entry.name not in drop]
    new = [edit for edit in edits.values() if isinstance(edit, Addition)]
    return plan + [PlannedTensor(edit.name, edit.dtype, edit.shape) for edit in new]


def becomes(entry: TensorEntry, edit: Change | None) -> PlannedTensor:
    """What a tensor of the base is in the result."""
    if not isinstance(edit, Edit):
        return PlannedTensor(entry.name, entry.code, entry.shape)
    return PlannedTensor(entry.name, edit.dtype or entry.code, edit.shape or entry.shape)


def _write_by_rows(writer: ShardWriter, tensor: PlannedTensor, entry: TensorEntry, edit: RowEdit) -> None:
    unit, row = tensor.nbytes // max(1, tensor.shape[0]), 0
    with reading(entry) as read:

        def fill(rows: memoryview) -> None:
            nonlocal row
            read(rows)
            edit.apply(row, rows)
            row += len(rows) // unit

        writer.write_pieces(tensor, fill, unit=max(1, unit))


def _made_ahead(edits: Sequence[Edit | Addition], entries: Mapping[str, TensorEntry]) -> Iterator[Tensor]:
    """The changed tensors one by one; while one is written, the next is read and computed, and no more than that."""
    with ThreadPoolExecutor(1) as aside:
        ahead = [aside.submit(_make, edit, entries) for edit in edits[:1]]
        for following in (*edits[1:], None):
            made = ahead.pop().result()
            if following is not None:
                ahead.append(aside.submit(_make, following, entries))
            yield made
            del made


def _make(edit: Edit | Addition, entries: Mapping[str, TensorEntry]) -> Tensor:
    made = edit.apply(load(entries[edit.name])) if isinstance(edit, Edit) else edit.make()
    from truetune.ops.finite import are_finite  # what makes whole tensors has imported torch already

    if not are_finite(made):
        raise not_finite(edit.name)
    return made


def not_finite(name: str) -> ModelError:
    """Why a merge ends: a model with NaN in it would be written as if nothing were wrong."""
    return ModelError(
        f"{name} would hold NaN or infinity when merged",
        ("likely", "the adapter or the base holds such values, the adapter's weight is too large, or the sum is beyond "
         "the range of the base's dtype"),
        ("way out", "truetune inspect says which of them is damaged; nothing was written"),
    )  # fmt: skip
