"""What an adapter changes in a checkpoint: one edit per tensor, for the streaming merge."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from truetune.adapters.files import AdapterFile, replaced_tensors, site_params
from truetune.adapters.inject import attachment, tied_paths
from truetune.adapters.lora import LoRAParams, merge
from truetune.adapters.lora_embedding import LoRAEmbedding, merge_table
from truetune.checkpoint.tensors import TensorEntry, load
from truetune.errors import AdapterError
from truetune.export.merge import Addition, Edit, name_in_checkpoint
from truetune.ops.frozen import is_conv1d

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Fold:
    """The edits, and what must change in ``config.json`` with them."""

    edits: Mapping[str, Edit | Addition]
    config: Mapping[str, Any]


def fold(model: nn.Module, file: AdapterFile, entries: Mapping[str, TensorEntry], *, prefix: str) -> Fold:
    """Turn an adapter into edits of a base checkpoint.

    Args:
        model: the base with this adapter attached, on the meta device: it says which layer is of which kind.
        entries: the checkpoint's tensors.
        prefix: the model's ``base_model_prefix``, which some checkpoints leave out of their names.
    Raises:
        AdapterError: a tensor the adapter changes is not in the checkpoint.
    """
    changes = _changes(model, file)
    stored = {name: name_in_checkpoint(name, list(entries), prefix) for name in changes}
    edits: dict[str, Edit | Addition] = {key: Edit(key, changes[name]) for name, key in stored.items() if key}
    config: dict[str, Any] = {}
    attached, shared = attachment(model), tied_paths(model)
    assert attached is not None
    if shared:
        table, head = (f"{path}.weight" for path in shared)
        if attached.tied:
            stored[head] = stored.get(head) or ""  # the table's edit is the head's as well
        elif {table, head} & set(changes):
            config["tie_word_embeddings"] = False
            if not stored.get(head):
                edits[head] = _own_head(
                    head, changes.get(head), entries[name_in_checkpoint(table, list(entries), prefix) or table]
                )
                stored[head] = head
    if missing := [name for name, key in stored.items() if key is None]:
        raise AdapterError(
            f"the base's files have no tensor {', '.join(missing[:5])}" + (" …" if len(missing) > 5 else ""),
            ("likely", "transformers renames this model's weights while loading, which a streaming merge can't follow"),
        )
    return Fold(edits, config)


def _own_head(name: str, change: Change | None, source: TensorEntry) -> Addition:
    """The head was the table and now differs from it: it gets a tensor of its own."""
    return Addition(name, source.dtype, source.shape, lambda: change(load(source)) if change else load(source))


def _changes(model: nn.Module, file: AdapterFile) -> dict[str, Change]:
    """Name of a base tensor → what becomes of it."""
    changes: dict[str, Change] = {}
    for path, adapter, params in site_params(model, file):
        if isinstance(adapter, LoRAEmbedding):
            changes[f"{path}.weight"] = _table(params)
        else:
            changes[f"{path}.weight"] = _linear(params, transposed=is_conv1d(adapter.base))
    return changes | {name: _replacement(tensor) for name, tensor in replaced_tensors(model, file).items()}


def _linear(params: LoRAParams, *, transposed: bool) -> Change:
    def apply(weight: Tensor) -> Tensor:
        merged, _ = merge(weight.T if transposed else weight, None, params)
        return merged.T.contiguous() if transposed else merged

    return apply


def _table(params: LoRAParams) -> Change:
    return lambda weight: merge_table(weight, params)


def _replacement(tensor: Tensor) -> Change:
    return lambda weight: tensor.to(weight.dtype)
