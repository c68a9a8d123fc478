"""A merge that is planned by files alone, as most are: one plain LoRA into a plain base in a folder here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from truetune.adapters.names import CARD, CONFIG
from truetune.checkpoint.tensors import open_index
from truetune.config.merge import MergeConfig
from truetune.errors import ModelError
from truetune.export.merge_lora import row_edits
from truetune.models.by_files import plain_config
from truetune.models.names import is_local
from truetune.recipes.adapter_base import check_base
from truetune.recipes.merge_work import Work


@dataclass(frozen=True)
class _Told:
    """What an adapter's folder says of itself."""

    folder: Path
    config: Mapping[str, Any]
    card: Mapping[str, Any]


def planned(config: MergeConfig) -> Work | None:
    """The plan; None where there is more to it, or something is wrong: ``merge_model`` knows all, and says what.

    Raises:
        AdapterError: the adapter is of another base.
    """
    asks_for_more = config.combines or config.recipe() or config.verify or config.onto != "auto" or config.revision
    if config.to != "model" or asks_for_more or config.model is None or not is_local(config.model):
        return None
    base, folder = Path(config.model).expanduser(), Path(next(iter(config.weights))).expanduser()
    try:
        entries, file = open_index(base), _read(folder)
    except (ModelError, OSError, ValueError):
        return None
    model = plain_config(base, entries)
    if model is None or file is None or file.card.get("quantisation"):
        return None
    edits = row_edits(folder, file.config, model, entries)
    if edits is None:
        return None
    check_base(file, config.model, base, allowed=config.allowed)
    return Work(name=config.model, base=base, file=file, folders=(folder,), edits=edits)


def _read(folder: Path) -> _Told | None:
    """An adapter's two JSON files; None where one of them is no object."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    card = json.loads((folder / CARD).read_text(encoding="utf-8")) if (folder / CARD).is_file() else {}
    return _Told(folder, config, card) if isinstance(config, dict) and isinstance(card, dict) else None
