"""Experts that a model keeps as one parameter and its files one by one, as most mixtures are published."""

from __future__ import annotations

from collections.abc import Collection

from truetune.adapters.base import Change
from truetune.adapters.expert_lora import ExpertsChange
from truetune.checkpoint.tensors import name_in_checkpoint

# What files call the parts of one expert's matrix, from its first row to its last.
_PARTS = {
    "gate_up_proj": (("w1", "w3"), ("gate_proj", "up_proj")),
    "down_proj": (("w2",), ("down_proj",)),
    "up_proj": (("up_proj",),),
}
_FOLDERS = ("mlp", "block_sparse_moe", "feed_forward")  # what a layer's mixture is called in files


def files_of(name: str, count: int, keys: Collection[str], prefix: str) -> list[list[str]]:
    """By expert the tensors in the files, from the first row of its matrix to the last; [] where they don't hold it so.

    Args:
        name: of the parameter in the model.
        count: of experts.
        keys: the checkpoint's names.
        prefix: as ``name_in_checkpoint`` takes it.
    """
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


def one_by_one(name: str, change: Change, keys: Collection[str], prefix: str) -> dict[str, Change]:
    """Tensor in the files → what becomes of it, for a parameter that the files hold in parts; {} where they don't.

    Args:
        change: of the whole; further arguments as ``files_of``.
    """
    if not isinstance(change, ExpertsChange) or change.transposed:
        return {}
    found = files_of(name, len(change.pairs), keys, prefix)
    return {key: change.of_one(e, i, len(parts)) for e, parts in enumerate(found) for i, key in enumerate(parts)}
