"""Whether a base is the one that an adapter was trained on: by its files, which need no torch to be compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any, Protocol

from truetune.adapters.names import CARD, CONFIG, PICKLED, WEIGHTS
from truetune.checkpoint.atomic import sha256
from truetune.checkpoint.tensors import open_index, weight_files
from truetune.config.mismatch import Mismatch
from truetune.errors import AdapterError
from truetune.models.names import is_local
from truetune.models.weights import weight_hash


class Named(Protocol):
    """What an adapter's folder says of its base."""

    @property
    def folder(self) -> Path:
        """The adapter's own."""

    @property
    def config(self) -> Mapping[str, Any]:
        """``adapter_config.json``."""

    @property
    def card(self) -> Mapping[str, Any]:
        """``truetune.json``; empty where there is none."""


def check_base(file: Named, model: str, folder: Path | None, *, allowed: Collection[Mismatch] = ()) -> None:
    """Compare a base with the one an adapter was trained on: by the weights, or by name where their hash is not known.

    Args:
        model: as the user names it.
        folder: where its files are.
        allowed: the differences that are meant.
    Raises:
        AdapterError: they differ, and nobody said that this is meant.
        ModelError: they differ because the base's files are not whole.
    """
    if "base" in allowed:
        return
    card = file.card.get("base") or {}
    name, known = card.get("name") or file.config.get("base_model_name_or_path"), card.get("weights_sha256")
    found = weight_hash(folder) if known and folder else ""
    way_out = ("way out", "pass the base it was trained on, or --allow-mismatch base if the difference is meant")
    if known and found:
        if found != known:
            if folder and weight_files(folder):
                open_index(folder)  # files that are cut short are damaged, and no other weights
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


def check_same_base(parents: Sequence[Named]) -> None:
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


def _may_be_the_same(one: str, other: str) -> bool:
    """Two models of the Hub have the same name; a folder may be a copy, and is known by its last part."""
    first, second = _public_name(one), _public_name(other)
    if not (is_local(first) or is_local(second)):
        return first.lower() == second.lower()
    return PureWindowsPath(first).name.lower() == PureWindowsPath(second).name.lower()


def _public_name(name: str) -> str:
    """``org/model`` of a folder in the Hub's cache (``…/models--org--model/snapshots/COMMIT``), else the name."""
    cached = [part for part in PureWindowsPath(name).parts if part.startswith("models--")]
    path = str(Path(name).expanduser().resolve()) if is_local(name) and not cached else name
    return cached[0].removeprefix("models--").replace("--", "/") if cached else path


def identity_of(adapters: Sequence[Path], settings: str) -> str:
    """What decides what comes out beside the base: the adapters' files, and what is done with them."""
    digest = hashlib.sha256(settings.encode())
    for folder in adapters:
        for name in (CONFIG, WEIGHTS, PICKLED, CARD):
            if (folder / name).is_file():
                digest.update(json.dumps([name, sha256(folder / name)]).encode())
    return digest.hexdigest()
