"""``truetune export --to card``: ``README.md`` for the Hub, in a folder of its own or beside what it is about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from truetune.adapters import files
from truetune.checkpoint.atomic import write_text
from truetune.checkpoint.disk import writing
from truetune.config.export import ExportConfig
from truetune.errors import OutputError
from truetune.export.card import Subject, model_card
from truetune.models import load
from truetune.recipes.export_source import Source
from truetune.train.log import Screen

NAME = "README.md"


def run(config: ExportConfig, source: Source, screen: Screen) -> dict[str, Any]:
    """Write the card; one that is there already is not touched.

    Raises:
        OutputError: ``--out`` is a file, or has a card.
    """
    out = Path(config.out).expanduser()
    if out.is_file():
        raise OutputError(f"--out: {out} is a file", ("expected", f"a folder, which gets a {NAME}"))
    if (out / NAME).exists():
        raise OutputError(f"{out / NAME} is there already", ("way out", "move it away, or --out with another folder"))
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / NAME, model_card(_subject(config, source, out)))
    screen.say("card", str(out / NAME))
    if not source.card:
        screen.note(f"there is no {files.CARD} beside the weights: the card tells neither data nor results")
    if config.license is None:
        screen.note("no licence is stated; --license apache-2.0, for example, states one")
    return {"out": str(out), "card": str(out / NAME)}


def _subject(config: ExportConfig, source: Source, out: Path) -> Subject:
    card, file = source.card, source.file
    base = (card.get("base") or {}).get("name") or source.name
    return Subject(
        name=config.push.split("/")[1] if config.push else _title(source, out),
        base=str(base),
        method=file.settings.kind if file else None,
        is_adapter=file is not None,
        card=card,
        license=config.license,
        base_license=_license_of(str(base)),
    )


def _title(source: Source, out: Path) -> str:
    """The name of what it is about; ``adapter`` and ``model`` are every run's, whose own name says more."""
    folder = (source.file.folder if source.file else Path(source.name)).resolve()
    if folder.name in ("adapter", "model") and (folder.parent / "run.yaml").is_file():
        return folder.parent.name
    return folder.name or out.name


def _license_of(base: str) -> str | None:
    """What the front matter of the base's own card says, where the base is on this machine."""
    folder = load.known_copy(base)
    readme = folder / NAME if folder else None
    if readme is None or not readme.is_file():
        return None
    text = readme.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---\n"):
        return None
    try:
        front = yaml.safe_load(text[4:].partition("\n---")[0])
    except yaml.YAMLError:
        return None
    found = front.get("license") if isinstance(front, dict) else None
    return str(found) if found else None
