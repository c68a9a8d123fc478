"""``truetune export --to peft-serving``: an adapter that servers take, and where it needs one, a base of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from truetune.adapters import files, vocabulary
from truetune.checkpoint.atomic import atomic_folder
from truetune.config.export import ExportConfig
from truetune.config.methods import METHODS
from truetune.errors import counted
from truetune.export.new_folder import check_out
from truetune.export.serving import Served, check_servable, serving
from truetune.models import load
from truetune.models.tokenizer import ChatTokenizer
from truetune.recipes.artefacts import note_artefact
from truetune.recipes.export_source import Source, fold_into
from truetune.train.log import Screen


def run(config: ExportConfig, source: Source, screen: Screen) -> dict[str, Any]:
    """Write the adapter into ``--out``; or, where something must go into the base, ``base`` and ``adapter`` there."""
    file = source.file
    assert file is not None
    check_servable(file, mergeable=METHODS[file.settings.kind].mergeable)
    served = serving(file)
    out = Path(config.out).expanduser()
    check_out(file.folder, out)
    base = out / "base" if served.folded else None
    if base is not None:
        rest = ", ".join(f"{count} {what}" for what, count in served.folded.items())
        screen.say("base", f"servers take no {rest}: merged into a base of its own")
        fold_into(config, source, base, screen, beside=served.plain)
    where = None
    if served.plain:
        where = out / "adapter" if base else out
        _write_adapter(file, served, where, base)
    note_artefact(file.folder, out if where else out / "base")
    _tell(served, where, base, source, screen)
    return {
        "out": str(out),
        "adapter": str(where) if where else None,
        "base": str(base) if base else None,
        "rank": served.config.get("r"),
        "alpha": served.config.get("lora_alpha"),
        "max_lora_rank": served.max_lora_rank if served.plain else None,
        "layers": len(served.plain),
        "folded": dict(served.folded),
        "changes": list(served.changes),
    }


def _write_adapter(file: files.AdapterFile, served: Served, where: Path, base: Path | None) -> None:
    settings = dict(served.config)
    if base is not None:
        settings["base_model_name_or_path"] = str(base.resolve())
    with atomic_folder(where, manifest=False) as folder:
        card = _card_for(base, file.card) if base else file.card
        files.write(dataclasses.replace(file, config=settings, tensors=served.tensors, card=card), folder)


def _card_for(base: Path, card: Mapping[str, Any]) -> dict[str, Any]:
    """A card says which base it is for, and that is a new one: with other weights, and new tokens in its tokenizer."""
    told = {**(card.get("base") or {}), "name": str(base.resolve())}
    if "weights_sha256" in told:
        told["weights_sha256"] = load.weight_hash(base)
    if "vocabulary_sha256" in told:
        told["vocabulary_sha256"] = ChatTokenizer.load(str(base)).vocabulary_hash
    return {key: value for key, value in card.items() if key != vocabulary.KEY} | {"base": told}


def _tell(served: Served, where: Path | None, base: Path | None, source: Source, screen: Screen) -> None:
    for change in served.changes:
        screen.note(change)
    if where is None:
        screen.say("done", f"{base}: all of it is in the base, and no adapter is left")
        return
    screen.say("done", f"{where}: {counted(len(served.plain), 'layer')}, rank {served.config['r']}, "
               f"alpha {served.config['lora_alpha']:g}" + (f" · its base is {base}" if base else ""))  # fmt: skip
    if served.max_lora_rank is None:
        screen.warn(f"rank {served.config['r']} is more than vLLM takes (512)")
    else:
        screen.note(f"vllm serve {base or source.name} --enable-lora --max-lora-rank {served.max_lora_rank} "
                    f"--lora-modules NAME={where}")  # fmt: skip
