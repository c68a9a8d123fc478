"""Several adapters of one base made into one: what ``truetune merge`` folds, or writes with ``--to adapter``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import truetune
from truetune.adapters import files, tensors
from truetune.adapters.bank import Bank
from truetune.adapters.combine import Combination
from truetune.adapters.composed import attachment_of, layers_of
from truetune.adapters.files import AdapterFile
from truetune.adapters.held import Held
from truetune.adapters.peft_config import to_peft
from truetune.adapters.stack import check_additive, combined_updates, tied_of
from truetune.checkpoint.atomic import atomic_folder, sha256
from truetune.config.merge import MergeConfig
from truetune.config.methods import METHODS
from truetune.errors import AdapterError, ConfigError
from truetune.export.new_folder import check_out
from truetune.models import load
from truetune.recipes.adapter import check_same_base
from truetune.train.log import Screen


def read_all(config: MergeConfig) -> dict[str, AdapterFile]:
    """Folder as given → adapter.

    Raises:
        AdapterError: a folder that is none, or adapters of different bases.
    """
    found = {path: files.read(Path(path).expanduser()) for path in config.weights}
    if "base" not in config.allowed:
        check_same_base(list(found.values()))
    return found


def named_base(parents: Mapping[str, AdapterFile]) -> str:
    """The base that adapters name as theirs.

    Raises:
        ConfigError: they name none, or one that is not there.
    """
    named = (str(file.config.get("base_model_name_or_path") or "") for file in parents.values())
    base = next(filter(None, named), "")
    if not base or (load.is_local(base) and not Path(base).expanduser().is_dir()):
        what = f"the adapters name {base} as their base, and it is not there" if base else "the adapters name no base"
        raise ConfigError(what, ("way out", "--model with the base they were trained on; only its config is read"))
    return base


def run(config: MergeConfig, parents: Mapping[str, AdapterFile], model_config: Any, screen: Screen) -> dict[str, Any]:
    """Write one adapter made of several; returns what ``--json`` prints."""
    out = Path(config.out).expanduser()
    check_out(next(iter(parents.values())).folder, out)
    file = combined(config, parents, model_config, screen)
    with atomic_folder(out, manifest=False) as folder:
        files.write(file, folder)
    size = sum(path.stat().st_size for path in out.iterdir())
    ranks = sorted({len(t) for key, t in file.tensors.items() if key.endswith(("lora_A.weight", "lora_embedding_A"))})
    shown = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    screen.say("merge", f"{' + '.join(config.adapter)} → one adapter ({config.combine}), rank {shown}")
    screen.say("done", f"{config.out}: {size / 1e6:,.1f} MB, {len(file.tensors)} tensors")
    return {"out": config.out, "combine": config.combine, "ranks": ranks, "tensors": len(file.tensors), "bytes": size}


def combined(config: MergeConfig, parents: Mapping[str, AdapterFile], model_config: Any, screen: Screen) -> AdapterFile:
    """One adapter that is the combination of several, in memory.

    Raises:
        AdapterError: a method that has no sum, or adapters that can't be combined in this way; with the reason.
    """
    model = load.skeleton(load.dense_config(model_config), dtype=load.checkpoint_dtype(model_config))
    bank = Bank(model)
    helds = {name: bank.add(name, file) for name, file in parents.items()}
    for name, held in helds.items():
        _check_mergeable(held, name)
        check_additive(held, name)
        _check_parts(held, name)
    tied = tied_of(helds)
    combination = Combination(config.combine, config.rank, 0.5 if config.density is None else config.density)
    updates = combined_updates(
        {name: tensors.file_updates(held.layers, parents[name].tensors) for name, held in helds.items()},
        config.weights, combination, seed=config.seed,
    )  # fmt: skip
    bases = {path: place.base for path, place in bank.places.items()}
    bank.clear()
    model.requires_grad_(False)
    for path, layer in layers_of(bases, updates, tied).items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer)
    attached = attachment_of(updates, tied)
    model.truetune_attachment = attached
    first = next(iter(parents.values()))
    settings = to_peft(model, attached, base=first.config.get("base_model_name_or_path"))
    card = _card(config, parents, combination, screen)
    return AdapterFile(Path(" + ".join(config.adapter)), settings, tensors.to_file(model), card)


def _check_mergeable(held: Held, name: str) -> None:
    kind = held.attachment.config.kind
    if not METHODS[kind].mergeable:
        raise AdapterError(
            f"{name} was made by {kind}, which does not fold into weights",
            ("way out", "serve it beside its base: truetune generate --model BASE --adapter DIR"),
        )


def _check_parts(held: Held, name: str) -> None:
    if held.parts:
        parts = ", ".join(dict.fromkeys(part.name for part in held.parts))
        modules = ", ".join(held.attachment.full_modules[:5])
        raise AdapterError(
            f"{name} holds parts of the base that were trained in full ({modules or parts}): no low-rank update",
            ("way out", "truetune.set_adapter(model, [...], weights=[...]) adds them up on a loaded model"),
        )


def _card(
    config: MergeConfig, parents: Mapping[str, AdapterFile], combination: Combination, screen: Screen
) -> dict[str, Any]:
    """``truetune.json``: as the parents' where they agree, and what it was made of."""
    cards = [file.card for file in parents.values() if file.card]
    first = cards[0] if cards else {}
    agreed = (
        {"quantisation": first["quantisation"]} if "quantisation" in first and _agree(cards, "quantisation") else {}
    )
    computed = {(card.get("facts") or {}).get("compute") for card in cards}
    if len(computed) == 1 and None not in computed:
        agreed["facts"] = {"compute": computed.pop()}
    kept = {key: first[key] for key in ("format", "base", "template", "system", "date") if key in first}
    if not _agree(cards, "template") or not _agree(cards, "system"):
        screen.warn(f"the adapters were trained with different templates or system messages: the result takes those "
                    f"of {next(iter(parents))}")  # fmt: skip
    if not _agree(cards, "quantisation"):
        screen.warn("the adapters were trained on bases that were packed differently: the result is for a dense one")
    return {
        **kept,
        **agreed,
        "stop_ids": sorted({stop for card in cards for stop in card.get("stop_ids", ())}),
        "combination": {
            "kind": combination.kind,
            "rank": combination.rank,
            "density": combination.density if config.combine.startswith(("ties", "dare", "magnitude")) else None,
            "seed": config.seed if config.combine.startswith("dare") else None,
            "parents": [
                {
                    "folder": str(file.folder.resolve()),
                    "weight": config.weights[name],
                    "method": file.settings.kind,
                    "sha256": _hash(file),
                }
                for name, file in parents.items()
            ],
        },
        "versions": {
            "truetune": truetune.__version__,
            **{name: version(name) for name in ("torch", "transformers", "safetensors")},
        },
    }


def _agree(cards: Sequence[Mapping[str, Any]], key: str) -> bool:
    return all(card.get(key) == cards[0].get(key) for card in cards)


def _hash(file: AdapterFile) -> str | None:
    path = file.folder / files.WEIGHTS
    return sha256(path) if path.is_file() else None
