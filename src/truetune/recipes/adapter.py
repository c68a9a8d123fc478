"""An adapter and its base, brought together: on another base it would answer nonsense with a straight face."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from truetune.adapters.files import AdapterFile
from truetune.config.mismatch import Mismatch
from truetune.config.quant import QuantRecipe
from truetune.data.template import Template, asks_for_date, pin_date
from truetune.errors import AdapterError
from truetune.export.onto import recipe_of
from truetune.models import load
from truetune.models.tokenizer import ChatTokenizer
from truetune.recipes.adapter_base import check_base as check_base
from truetune.recipes.adapter_base import check_same_base as check_same_base


def base_name(model: str) -> str:
    """How an adapter names its base: a folder by its whole path, a model of the Hub as it is."""
    return str(Path(model).expanduser().resolve()) if load.is_local(model) else model


def describe_base(model: str, revision: str | None, config: Any) -> dict[str, Any]:
    """``base`` of ``truetune.json``: which weights these are, read from the files they were loaded from."""
    commit = getattr(config, "_commit_hash", None)
    folder = load.known_copy(model, revision=commit or revision)
    return {
        "name": base_name(model),
        "revision": commit or revision,
        "weights_sha256": (load.weight_hash(folder) if folder else "") or None,
        "architecture": (getattr(config, "architectures", None) or [None])[0],
    }


def check_template(file: AdapterFile, template: Template | None, *, allowed: Collection[Mismatch] = ()) -> None:
    """Compare the template that was asked for with the one an adapter was trained on; one made elsewhere names none.

    Raises:
        AdapterError: they word prompts in two ways, and nobody said that this is meant.
    """
    trained = file.card.get("template")
    if not trained or "template" in allowed:
        return
    day = file.card.get("date")
    asked = pin_date(template, day) if template and day and asks_for_date(template) else template
    if asked is None or asked.digest != trained["sha256"]:
        raise AdapterError(
            f"{file.folder} was trained on another template",
            ("trained on", f"{trained['name']} ({trained['sha256'][:8]})"),
            ("found", f"{asked.name} ({asked.digest[:8]})" if asked else "none: the bare prompt"),
            ("way out", "leave --template out: the adapter brings its own; --allow-mismatch template if it is meant"),
        )


def check_tokenizer(file: AdapterFile, tokenizer: ChatTokenizer, *, allowed: Collection[Mismatch] = ()) -> None:
    """Compare a base's vocabulary with the one an adapter was trained with, where it tells.

    Raises:
        AdapterError: the same text would be other tokens.
    """
    known = (file.card.get("base") or {}).get("vocabulary_sha256")
    if known and "tokenizer" not in allowed and (found := tokenizer.vocabulary_hash) != known:
        raise AdapterError(
            f"{file.folder} was trained with another vocabulary than that of this base's tokenizer",
            ("trained on", known[:12]),
            ("found", found[:12]),
            ("way out", "the tokenizer's files of that base; --allow-mismatch tokenizer if the difference is meant"),
        )


def packing_remark(file: AdapterFile, here: QuantRecipe | None) -> str | None:
    """What to say where a base is packed otherwise than while its adapter was trained: answers differ by that."""
    if "quantisation" not in file.card:
        return None
    trained = recipe_of(file.card)
    one, other = (str(recipe) if recipe else "dense" for recipe in (trained, here))
    if one == other:
        return None
    flags = f": --quant {trained.kind}{' --double-quant' if trained.double else ''}" if trained and not here else ""
    return f"the adapter was trained on {one} weights, and these are {other}{flags and flags + ' packs them as then'}"
