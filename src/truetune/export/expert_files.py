"""Experts that a model keeps as one parameter and its files one by one, as most mixtures are published."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from truetune.adapters.base import Change
from truetune.adapters.expert_lora import ExpertsChange
from truetune.checkpoint.header import TensorEntry
from truetune.checkpoint.tensors import name_in_checkpoint
from truetune.errors import QuantizationError
from truetune.quant.stack import Stack

# What files call the parts of one expert's matrix, from its first row to its last.
_PARTS = {
    "gate_up_proj": (("w1", "w3"), ("gate_proj", "up_proj")),
    "down_proj": (("w2",), ("down_proj",)),
    "up_proj": (("up_proj",),),
}
_FOLDERS = ("mlp", "block_sparse_moe", "feed_forward")  # what a layer's mixture is called in files


def files_of(name: str, count: int, keys: Collection[str], prefix: str, *, transposed: bool) -> list[list[str]]:
    """By expert the tensors in the files, from the first row of its matrix to the last; [] where they don't hold it so.

    Args:
        name: of the parameter in the model.
        count: of experts.
        keys: the checkpoint's names.
        prefix: as ``name_in_checkpoint`` takes it.
        transposed: the parameter is [experts, in, out]: never held so, as the files' matrices are [out, in].
    """
    if transposed:
        return []
    path, _, parameter = name.rpartition(".")
    layer, _, experts = path.rpartition(".")
    parent = layer.rpartition(".")[0]
    for parts in _PARTS.get(parameter, ()):
        for folder in dict.fromkeys((layer, *(f"{parent}.{folder}" for folder in _FOLDERS))):
            stem = f"{folder}.{experts}"
            found = [
                [name_in_checkpoint(f"{stem}.{e}.{part}.weight", keys, prefix) for part in parts] for e in range(count)
            ]
            if all(key for one in found for key in one):
                return [[key for key in one if key] for one in found]
    return []


def matrices_of(path: str, stack: Stack, entries: Mapping[str, TensorEntry], prefix: str) -> list[list[TensorEntry]]:
    """As ``files_of``, for a stack that is packed.

    Raises:
        QuantizationError: a tensor is not an even part of its expert's matrix.
    """
    count, rows, columns = stack.shape
    found = files_of(path, count, entries, prefix, transposed=stack.transposed)
    for keys in found:
        expected = (rows // len(keys), columns)
        for key in keys:
            if entries[key].shape != expected:
                raise QuantizationError(f"{key}: found {list(entries[key].shape)}, expected {list(expected)}")
    return [[entries[key] for key in keys] for keys in found]


def one_by_one(name: str, change: Change, keys: Collection[str], prefix: str) -> dict[str, Change]:
    """Tensor in the files → what becomes of it, for a parameter that the files hold in parts; {} where they don't.

    Args:
        change: of the whole; further arguments as ``files_of``.
    """
    if not isinstance(change, ExpertsChange):
        return {}
    found = files_of(name, len(change.pairs), keys, prefix, transposed=change.transposed)
    return {key: change.of_one(e, i, len(parts)) for e, parts in enumerate(found) for i, key in enumerate(parts)}
