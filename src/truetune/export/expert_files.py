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


def one_by_one(name: str, change: Change, keys: Collection[str], prefix: str) -> dict[str, Change]:
    """Tensor in the files → what becomes of it, for a parameter that the files hold in parts; {} where they don't.

    Args:
        name: of the parameter in the model.
        change: of the whole.
        keys: the checkpoint's names.
        prefix: as ``name_in_checkpoint`` takes it.
    """
    path, _, parameter = name.rpartition(".")
    layer, _, experts = path.rpartition(".")
    if not isinstance(change, ExpertsChange) or change.transposed:
        return {}
    parent = layer.rpartition(".")[0]
    for parts in _PARTS.get(parameter, ()):
        for folder in dict.fromkeys((layer, *(f"{parent}.{folder}" for folder in _FOLDERS))):
            found = {
                name_in_checkpoint(f"{folder}.{experts}.{e}.{part}.weight", keys, prefix): change.of_one(
                    e, i, len(parts)
                )
                for e in range(len(change.pairs))
                for i, part in enumerate(parts)
            }
            if None not in found:
                return {key: one for key, one in found.items() if key}
    return {}
