"""What a merge will write: the adapter's edits, and for a base that was quantised, what its packed layers become."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from truetune.adapters import files
from truetune.adapters.inject import attachment
from truetune.adapters.vocabulary import rows_of_table
from truetune.checkpoint.tensors import open_index
from truetune.config.merge import MergeConfig
from truetune.config.methods import METHODS
from truetune.config.quant import QuantRecipe
from truetune.errors import AdapterError, ConfigError
from truetune.export.fold import Fold, check_plain, fold
from truetune.export.onto import Drift, on_quantised, recipe_of, stored_packed, unpacked
from truetune.export.onto_experts import experts_on_quantised, experts_unpacked
from truetune.models import load
from truetune.models.by_files import PlainConfig, plain_config
from truetune.models.outline import outline
from truetune.quant.replace import linear_layers, planned_stacks, quantisable
from truetune.recipes.new_tokens import vocabulary_update


@dataclass(frozen=True)
class MergePlan:
    """The edits, the tensors to leave out, and how far the result will be from the model that was trained.

    ``onto`` is ``base`` where nothing was quantised, and then there is no ``drift``.
    """

    changes: Fold
    drop: tuple[str, ...] = ()
    onto: Literal["base", "original", "dequantized"] = "base"
    drift: Drift | None = None


def config_of(config: MergeConfig, file: files.AdapterFile, base: Path) -> Any:
    """The base's config: by its files where they tell all that this merge asks of it, else as transformers reads it.

    Raises:
        ModelError: as ``load.load_config``.
    """
    settings = file.settings
    packs = config.combines or config.recipe() or recipe_of(file.card)
    if settings.kind == "lora" and not (settings.token_rows or packs or file.beneath):
        found = plain_config(base, open_index(base))
        if found is not None:
            return found
    return load.load_config(str(base))


def plan_merge(config: MergeConfig, file: files.AdapterFile, base: Path, model_config: Any) -> MergePlan:
    """Decide what is merged onto what.

    Raises:
        ConfigError: ``--onto`` asks for weights that are not there.
        AdapterError: the adapter does not fit the base.
    """
    if not METHODS[file.settings.kind].mergeable:
        raise AdapterError(
            f"{file.folder} was made by {file.settings.kind}, which does not fold into weights",
            ("way out", "serve it beside its base: truetune generate --model BASE --adapter DIR"),
        )
    stored, trained_on = load.check_readable(str(base), model_config), recipe_of(file.card)
    dtype = _dtype(file, model_config)
    entries = open_index(base)
    if isinstance(model_config, PlainConfig):
        model: Any = outline(model_config, entries)
    else:
        model = load.skeleton(load.dense_config(model_config), dtype=dtype)
    prefix = model.base_model_prefix
    recipe = stored or trained_on
    paths = [path for path, _ in linear_layers(model)] if stored else quantisable(model, recipe) if recipe else []
    layers = {path: model.get_submodule(path) for path in paths}
    stacks = planned_stacks(model, recipe, dtype=dtype) if recipe else {}
    again = config.recipe()
    drift = Drift(again, _repacked(model, again) if again else (), load.checkpoint_dtype(model_config))
    files.load(model, file)
    changes = _with_vocabulary(fold(model, file, entries, prefix=prefix), model, base)
    _check_onto(config, stored, trained_on)
    if recipe is None:
        check_plain(file, changes, entries)
        return MergePlan(changes)
    if stored and stored_packed(entries):
        edits, drop = unpacked(changes.edits, layers, entries, stored, dtype=dtype, prefix=prefix, drift=drift)
        edits, apart = experts_unpacked(edits, stacks, entries, stored, dtype=dtype, prefix=prefix, drift=drift)
        drop += apart
        updates = {**changes.config, "quantization_config": None}
        return MergePlan(Fold(edits, updates), tuple(drop), "dequantized", drift)
    onto: Literal["original", "dequantized"] = "original" if config.onto == "original" else "dequantized"
    edits = on_quantised(
        changes.edits, layers, entries, recipe, onto=onto, dtype=dtype, prefix=prefix, drift=drift
    )  # fmt: skip
    edits = experts_on_quantised(
        edits, stacks, entries, recipe, onto=onto, dtype=dtype, prefix=prefix, drift=drift
    )  # fmt: skip
    return MergePlan(Fold(edits, changes.config), (), onto, drift)


def _repacked(model: Any, again: QuantRecipe) -> list[str]:
    """Paths of the layers, and of the stacks of experts, that are packed after the merge."""
    return [*quantisable(model, again), *planned_stacks(model, again, dtype=load.checkpoint_dtype(model.config))]


def _with_vocabulary(changes: Fold, model: Any, base: Path) -> Fold:
    """Where the adapter brought tokens, the config tells of as many rows as there are."""
    attached = attachment(model)
    if attached is None or attached.grew_from in (None, rows := rows_of_table(model)):
        return changes
    return Fold(changes.edits, {**changes.config, **vocabulary_update(base, rows)})


def _check_onto(config: MergeConfig, stored: QuantRecipe | None, trained_on: QuantRecipe | None) -> None:
    if config.onto == "original" and stored:
        raise ConfigError(
            f"--onto original: {config.model} holds packed weights ({stored}), not the original ones",
            ("way out", "--model with the unquantised base that it was made from"),
        )
    if config.onto == "dequantized" and not (stored or trained_on):
        raise ConfigError(
            "--onto dequantized: neither this base is quantised, nor was the adapter trained on one that is"
        )


def _dtype(file: files.AdapterFile, model_config: Any) -> torch.dtype:
    """What the packed layers computed in while the adapter was trained."""
    name = (file.card.get("facts") or {}).get("compute")
    found = getattr(torch, str(name), None)
    return found if isinstance(found, torch.dtype) else load.checkpoint_dtype(model_config)
