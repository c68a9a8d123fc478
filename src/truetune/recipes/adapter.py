"""An adapter and its base, brought together: on another base it would answer nonsense with a straight face."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

from truetune.adapters.files import AdapterFile
from truetune.config.mismatch import Mismatch
from truetune.config.quant import QuantRecipe
from truetune.data.template import Template, asks_for_date, pin_date
from truetune.errors import AdapterError
from truetune.export.onto import recipe_of
from truetune.models import load
from truetune.models.tokenizer import ChatTokenizer


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


def check_base(file: AdapterFile, model: str, folder: Path | None, *, allowed: Collection[Mismatch] = ()) -> None:
    """Compare a base with the one an adapter was trained on: by the weights, or by name where their hash is not known.

    Args:
        model: as the user names it.
        folder: where its files are.
        allowed: the differences that are meant.
    Raises:
        AdapterError: they differ, and nobody said that this is meant.
    """
    if "base" in allowed:
        return
    card = file.card.get("base") or {}
    name, known = card.get("name") or file.config.get("base_model_name_or_path"), card.get("weights_sha256")
    found = load.weight_hash(folder) if known and folder else ""
    way_out = ("way out", "pass the base it was trained on, or --allow-mismatch base if the difference is meant")
    if known and found:
        if found != known:
            raise AdapterError(
                f"{file.folder} was trained on other weights than those in {model}",
                ("trained on", f"{name} ({known[:12]})"),
                ("found", f"{folder} ({found[:12]})"),
                way_out,
            )
    elif name and not _may_be_the_same(str(name), model):
        raise AdapterError(
            f"{file.folder} was trained on another base than {model}, by its name",
            ("trained on", str(name)),
            ("found", model),
            way_out,
        )


def check_same_base(parents: Sequence[AdapterFile]) -> None:
    """Compare the bases of adapters that are to be used together: by the weights, or by name where a hash is missing.

    Raises:
        AdapterError: two of them were trained on different bases.
    """
    first, *others = parents
    one = first.card.get("base") or {}
    name = str(one.get("name") or first.config.get("base_model_name_or_path") or "")
    for file in others:
        base = file.card.get("base") or {}
        other = str(base.get("name") or file.config.get("base_model_name_or_path") or "")
        hashes = one.get("weights_sha256"), base.get("weights_sha256")
        same = hashes[0] == hashes[1] if all(hashes) else not (name and other) or _may_be_the_same(name, other)
        if not same:
            raise AdapterError(
                f"{file.folder} was trained on another base than {first.folder}",
                ("one", f"{name} ({str(hashes[0])[:12]})"),
                ("other", f"{other} ({str(hashes[1])[:12]})"),
                ("way out", "adapters of one base; --allow-mismatch base if the difference is meant"),
            )


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


def _may_be_the_same(one: str, other: str) -> bool:
    """Two models of the Hub have the same name; a folder may be a copy, and is known by its last part."""
    first, second = _public_name(one), _public_name(other)
    if not (load.is_local(first) or load.is_local(second)):
        return first.lower() == second.lower()
    return PureWindowsPath(first).name.lower() == PureWindowsPath(second).name.lower()


def _public_name(name: str) -> str:
    """``org/model`` of a folder in the Hub's cache (``…/models--org--model/snapshots/COMMIT``), else the name."""
    cached = [part for part in PureWindowsPath(name).parts if part.startswith("models--")]
    path = str(Path(name).expanduser().resolve()) if load.is_local(name) and not cached else name
    return cached[0].removeprefix("models--").replace("--", "/") if cached else path
