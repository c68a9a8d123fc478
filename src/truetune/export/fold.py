"""What an adapter changes in a checkpoint: one edit per tensor, for the streaming merge."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from truetune.adapters import tensors
from truetune.adapters.base import Change
from truetune.adapters.files import AdapterFile
from truetune.adapters.inject import attachment, tied_paths
from truetune.adapters.targets import output_head
from truetune.adapters.token_rows import innermost
from truetune.adapters.vocabulary import new_tokens, resized, rows_of_table
from truetune.checkpoint.header import TensorEntry, few
from truetune.checkpoint.tensors import load, name_in_checkpoint
from truetune.errors import AdapterError
from truetune.export.expert_files import one_by_one
from truetune.export.merge import Addition, Edit

_PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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
    attached = attachment(model)
    assert attached is not None
    larger = _enlarged(model)
    changes |= {name: _enlarge(changes.get(name), *sizes) for name, sizes in larger.items()}
    keys = list(entries)
    stored = {name: name_in_checkpoint(name, keys, prefix) for name in changes}
    apart = {
        name: parts
        for name, key in stored.items()
        if not key and (parts := one_by_one(name, changes[name], entries, prefix))
    }
    shapes = {name: (rows, *entries[key].shape[1:]) for name, (rows, _) in larger.items() if (key := stored[name])}
    edits: dict[str, Edit | Addition] = {
        key: Edit(key, changes[name], shape=shapes.get(name)) for name, key in stored.items() if key
    }
    edits |= {key: Edit(key, change) for parts in apart.values() for key, change in parts.items()}
    config: dict[str, Any] = {}
    shared = tuple(f"{path}.weight" for path in attached.untied or tied_paths(model))
    where = {name: name_in_checkpoint(name, keys, prefix) for name in shared}
    if shared and (attached.tied or attached.one_matrix):
        change, shape = changes[shared[0]], next((shapes[name] for name in shared if name in shapes), None)
        # Some files hold the one matrix twice.
        edits |= {key: Edit(key, change, shape=shape) for key in where.values() if key}
    elif set(shared) & set(changes):
        config["tie_word_embeddings"] = False
        for name, other in (shared, shared[::-1]):
            if not where[name] and (key := where[other]):
                edits[name] = _of_its_own(name, changes.get(name), entries[key], shapes.get(other))
    if missing := [name for name, key in stored.items() if not key and name not in {*shared, *apart}]:
        raise AdapterError(
            f"the base's files have no tensor {', '.join(missing[:5])}" + (" …" if len(missing) > 5 else ""),
            ("likely", "transformers renames this model's weights while loading, which a streaming merge can't follow"),
        )
    return Fold(edits, config)


def check_plain(file: AdapterFile, changes: Fold, entries: Mapping[str, TensorEntry]) -> None:
    """That every tensor to be changed is stored as numbers that can be added to.

    Raises:
        AdapterError: some are packed, in a way that the base's config does not tell of.
    """
    edited = [entries[name] for name, edit in changes.edits.items() if isinstance(edit, Edit)]
    packed = [
        f"{entry.name} ({str(entry.dtype).removeprefix('torch.')})" for entry in edited if entry.dtype not in _PLAIN
    ]
    if packed:
        raise AdapterError(
            f"{file.folder} changes tensors that are not plain floating-point numbers in this base",
            ("tensors", few(packed)),
            ("because", "its config.json does not say how they are quantised"),
            ("way out", "pass the unquantised base that it was made from"),
        )


def _of_its_own(
    name: str, change: Change | None, source: TensorEntry, shape: tuple[int, ...] | None = None
) -> Addition:
    """Table and head were one tensor and now differ: the one that the files lacked gets a tensor too."""
    return Addition(name, source.dtype, shape or source.shape, lambda: change(load(source)) if change else load(source))


def _enlarged(model: nn.Module) -> dict[str, tuple[int, int | None]]:
    """Name of a tensor → ``(rows, of how many the new ones are the mean)``, where new tokens made it larger."""
    attached, new = attachment(model), new_tokens(model)
    rows = rows_of_table(model)
    if attached is None or attached.grew_from in (None, rows):
        return {}
    ends = (model.get_input_embeddings(), output_head(model))  # type: ignore[operator]
    layers = {id(innermost(layer)) for layer in ends if layer is not None}
    found: dict[str, tuple[int, int | None]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if id(module) in layers:
            own = re.sub(r"(\.base)+$", "", path)
            found |= {f"{own}.{name}": (rows, new.known if new else None) for name, _ in module.named_parameters()}
    return found


def _enlarge(then: Change | None, rows: int, known: int | None) -> Change:
    """More rows, and then what the adapter does to all of them."""

    def apply(tensor: Tensor) -> Tensor:
        larger = resized(tensor, rows, known=known)
        return then(larger) if then else larger

    return apply


def _changes(model: nn.Module, file: AdapterFile) -> dict[str, Change]:
    """Name of a base tensor → what becomes of it."""
    changes = tensors.changes(model, file.tensors)
    for name, copy in tensors.base_copies(model, file.tensors).items():
        if name in changes:
            changes[name] = _checked(changes[name], copy, f"{file.folder}: the copy of {name} in it")
    return changes | {
        name: _replacement(tensor, changes.get(name))
        for name, tensor in tensors.replaced_tensors(model, file.tensors).items()
    }


def _checked(change: Change, copy: Tensor, what: str) -> Change:
    """Compare the base with the adapter's own copy of it before it is changed."""

    def apply(weight: Tensor) -> Tensor:
        if not torch.equal(copy.to(weight.dtype), weight):
            way_out = "pass the base that the adapter was trained on"
            raise AdapterError(f"{what} is not what this base holds", ("way out", way_out))
        return change(weight)

    return apply


def _replacement(tensor: Tensor, then: Change | None) -> Change:
    """A part that was trained, and on top of that what an adapter does to it: a bias that is trained and scaled."""
    return lambda weight: (then(tensor) if then else tensor).to(weight.dtype)
