"""Tensors on disk, one at a time: read safetensors checkpoints in memory that doesn't grow with the model.

The safetensors library maps whole files, and mapped pages count as resident and stay. Here a header is read into
entries, and an entry is read with a plain ``read`` when it is wanted. ``checkpoint.shards`` writes in the same manner.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from truetune.checkpoint.header import TensorEntry, damaged, few, read_header
from truetune.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that count in a model's folder, sorted; a shard that is listed may be missing.

    ``model.safetensors`` goes before an index, as in transformers.

    Raises:
        ModelError: an index that can't be read.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        return []
    return [folder / shard for shard in sorted(set(_read_weight_map(folder / INDEX).values()))]


def open_index(folder: Path) -> dict[str, TensorEntry]:
    """Every tensor of a model folder, by name, in the order of the files; only headers are read.

    A tensor that a shard holds and the index leaves out is listed too, because transformers would load it.

    Raises:
        ModelError: no safetensors here, a shard is missing or damaged, or the index names what no shard holds.
    """
    files = weight_files(folder)
    if not files:
        raise _no_weights(folder)
    if files == [folder / SINGLE]:
        return read_header(folder / SINGLE)
    weight_map = _read_weight_map(folder / INDEX)
    shards = [file.name for file in files]
    if absent := [shard for shard in shards if not (folder / shard).is_file()]:
        found = f"{len(shards) - len(absent)} of {len(shards)} shards"
        raise ModelError(
            f"{folder}: {len(absent)} of the shards that {INDEX} names are missing",
            ("missing", few(absent)),
            ("found", found),
            ("way out", "download the missing files again"),
        )
    entries: dict[str, TensorEntry] = {}
    for shard in shards:
        held = read_header(folder / shard)
        entries |= {name: entry for name, entry in held.items() if weight_map.get(name, shard) == shard}
    if lost := [f"{name} (in {shard})" for name, shard in weight_map.items() if name not in entries]:
        raise ModelError(
            f"{folder / INDEX}: names {len(lost)} tensors that their shards don't hold",
            ("missing", few(lost)),
            ("way out", "download the index and the shards again, from the same revision"),
        )
    return entries


def load(entry: TensorEntry) -> Tensor:
    """Read exactly this tensor's bytes into memory of its own.

    Raises:
        ModelError: the file is gone, can't be read, or has become shorter.
    """
    import torch

    raw = torch.empty(entry.nbytes, dtype=torch.uint8)
    with _reading(entry) as file:
        _fill(entry, file, raw.numpy().data)
    return raw.view(entry.dtype).reshape(entry.shape)


@contextlib.contextmanager
def reading(entry: TensorEntry) -> Iterator[Callable[[memoryview], None]]:
    """Read this tensor's bytes from front to back: each call of what is yielded fills the memory that it is given.

    Raises:
        ModelError: as ``load``.
    """
    with _reading(entry) as file:
        yield lambda into: _fill(entry, file, into)


def name_in_checkpoint(module_tensor: str, index_keys: Collection[str], prefix: str) -> str | None:
    """What the files call a model's tensor, or None if they don't hold it.

    Files saved from a bare body lack the body's name, which a model with a head puts before it (GPT-2:
    ``h.0.attn.c_attn.weight`` in the file, ``transformer.h.0.attn.c_attn.weight`` in the model), or the reverse.

    Args:
        module_tensor: the parameter's name in the model.
        index_keys: the tensor names of the checkpoint.
        prefix: the model's ``base_model_prefix``; may be empty.
    """
    if module_tensor in index_keys or not prefix:
        return module_tensor if module_tensor in index_keys else None
    bare = module_tensor.removeprefix(f"{prefix}.")
    other = bare if bare != module_tensor else f"{prefix}.{module_tensor}"
    return other if other in index_keys else None


def _read_weight_map(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        # A plain file name only: an index must not send us to read elsewhere.
        well_formed = all(isinstance(shard, str) and Path(shard).name == shard for shard in weight_map.values())
    except OSError as error:
        raise ModelError(f"{path}: can't be read: {error.strerror or error}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise damaged(path, "not an index", 'a JSON object with "weight_map"', str(error)) from error
    if not well_formed or not weight_map:
        raise damaged(path, "not an index", "tensor names, each with a file of this folder", few(weight_map.values()))
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
            raise damaged(entry.file, f"ends inside {entry.name}", f"{len(into):,} bytes more", f"{done:,}")
        done += count


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
    return ModelError(f"{folder}: the weights are pickled", ("found", few(legacy)), ("way out", convert))
