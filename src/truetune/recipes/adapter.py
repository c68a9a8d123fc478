"""An adapter and its base, brought together: on another base it would answer nonsense with a straight face."""

from __future__ import annotations

from pathlib import Path, PureWindowsPath
from typing import Any

from truetune.adapters.files import AdapterFile
from truetune.config.quant import QuantRecipe
from truetune.errors import AdapterError
from truetune.export.onto import recipe_of
from truetune.models import load


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


def check_base(file: AdapterFile, model: str, folder: Path | None, *, allow_other: bool) -> None:
    """Compare a base with the one an adapter was trained on: by the weights, or by name where their hash is not known.

    Args:
        model: as the user names it.
        folder: where its files are.
    Raises:
        AdapterError: they differ, and nobody said that this is meant.
    """
    if allow_other:
        return
    card = file.card.get("base") or {}
    name, known = card.get("name") or file.config.get("base_model_name_or_path"), card.get("weights_sha256")
    found = load.weight_hash(folder) if known and folder else ""
    way_out = ("way out", "pass the base it was trained on, or --allow-other-base if the difference is meant")
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
