"""``truetune export``: what was trained, in the form that another program takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from truetune.adapters import files
from truetune.config.export import ExportConfig
from truetune.config.merge import MergeConfig
from truetune.config.resolve import Resolved, resolve
from truetune.errors import AdapterError
from truetune.models import load
from truetune.recipes import export_card, export_gguf, export_push, export_serving, merge
from truetune.recipes.adapter import check_base
from truetune.recipes.export_source import Source
from truetune.train.log import Screen


def run(resolved: Resolved[ExportConfig]) -> dict[str, Any]:
    """Export as the config says; returns what ``--json`` prints."""
    config, screen = resolved.config, Screen()
    if config.push:
        export_push.check(config.push)
    source = find_source(config)
    match config.to:
        case "hf":
            result = _merged(config, source)
        case "peft-serving":
            result = export_serving.run(config, source, screen)
        case "gguf" | "ollama":
            result = export_gguf.run(config, source, screen)
        case "card":
            result = export_card.run(config, source, screen)
    if config.push:
        out = Path(str(result["out"]))
        if config.to == "card" and out.is_dir():  # into a run's folder, perhaps: its rows stay here
            out /= "README.md"
        result["pushed"] = export_push.push(config.push, out, screen)
    return {"to": config.to, **result}


def find_source(config: ExportConfig) -> Source:
    """The base and the adapter that a config names; a run's folder stands for what the run left.

    Raises:
        AdapterError: no adapter there, one that names no base, or another base than it was trained on.
        ModelError: the base is not there.
    """
    file = files.read(_folder(Path(config.adapter).expanduser())) if config.adapter else None
    name = config.model or str(
        ((file.card.get("base") or {}).get("name") or file.config.get("base_model_name_or_path") or "") if file else ""
    )
    if not name:
        raise AdapterError(f"{config.adapter} does not name its base", ("way out", "--model BASE"))
    if file is None and (Path(name) / "run.yaml").is_file():
        if (Path(name) / "model" / "config.json").is_file():
            name = str(Path(name) / "model")
        else:
            raise AdapterError(f"{name} is a run that left an adapter", ("way out", f"--adapter {name}"))
    # A card tells of a base by its name, and so does an adapter for serving, where the base may be on another machine.
    needs_base = config.to not in ("card", "peft-serving")
    if file is not None and (needs_base or load.is_local(name)):
        check_base(file, name, load.known_copy(name, revision=config.revision), allowed=config.allowed)
    return Source(name, file)


def _folder(path: Path) -> Path:
    """A run's adapter, or the folder itself."""
    return path / "adapter" if (path / "adapter" / files.CONFIG).is_file() else path


def _merged(config: ExportConfig, source: Source) -> dict[str, Any]:
    assert source.file is not None
    flags = {
        "model": source.name,
        "adapter": (str(source.file.folder),),
        "out": config.out,
        "revision": config.revision,
        "max_shard_gb": config.max_shard_gb,
        "allow_mismatch": tuple(sorted(config.allowed)),
    }
    return merge.run(resolve(MergeConfig, file=None, flags=flags))
