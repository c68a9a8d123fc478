"""What is exported, and the words that go with it: the base, an adapter on it, its template and stop tokens."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from truetune.adapters import files
from truetune.checkpoint.disk import existing, writing
from truetune.checkpoint.tensors import name_in_checkpoint, open_index
from truetune.config.export import ExportConfig
from truetune.config.merge import MergeConfig
from truetune.config.resolve import resolve
from truetune.data.template import Template, resolve_template
from truetune.errors import AdapterError
from truetune.export.merge import merge_checkpoint
from truetune.models import load
from truetune.models.tokenizer import ChatTokenizer
from truetune.recipes.merge_beside import extra_files
from truetune.recipes.merge_model import tokenizer_files
from truetune.recipes.merge_plan import plan_merge
from truetune.train.log import Screen


@dataclass(frozen=True)
class Source:
    """A base by its name, and an adapter on it; without one, the model is exported as it is."""

    name: str
    file: files.AdapterFile | None

    @property
    def folder(self) -> Path:
        """Of the adapter, else of the model."""
        return self.file.folder if self.file is not None else Path(self.name).expanduser()

    @property
    def card(self) -> Mapping[str, Any]:
        """``truetune.json`` of the adapter, or of a model that was tuned whole; empty where there is none."""
        if self.file is not None:
            return self.file.card
        beside = Path(self.name).expanduser() / files.CARD
        if not beside.is_file():
            return {}
        found: dict[str, Any] = json.loads(beside.read_text(encoding="utf-8"))
        return found


@contextmanager
def merged_folder(config: ExportConfig, source: Source, near: Path, screen: Screen) -> Iterator[Path]:
    """A folder with the model that is exported; of a merged one a temporary, on the disk of ``near``."""
    if source.file is None or config.as_adapter:
        yield load.local_copy(source.name, revision=config.revision)
        return
    place = existing(near.resolve().parent)
    with ExitStack() as stack:
        with writing(place):
            folder = stack.enter_context(TemporaryDirectory(prefix=".truetune-export-", dir=place))
        screen.say("merge", f"{source.file.folder} → {source.name}")
        out = Path(folder) / "merged"
        fold_into(config, source, out, screen)
        yield out


def fold_into(config: ExportConfig, source: Source, out: Path, screen: Screen, *, beside: Collection[str] = ()) -> None:
    """Write the base with the adapter in it into ``out``.

    Args:
        beside: paths of layers that stay as they are, because their update is served beside the base.
    Raises:
        AdapterError: it does not fit, or has something to keep beside a base that is packed.
    """
    file = source.file
    assert file is not None
    flags = {"model": source.name, "adapter": (str(file.folder),), "out": str(out), "revision": config.revision}
    merge_config = resolve(MergeConfig, file=None, flags=flags).config
    folder = load.local_copy(source.name, revision=config.revision)
    model_config = load.load_config(str(folder))
    plan = plan_merge(merge_config, file, folder, model_config)
    if beside and plan.drift is not None:
        raise AdapterError(
            f"{file.folder} was trained on packed weights, and holds more than servers take beside them",
            ("way out", "--to hf, which makes one dense model of both"),
        )
    prefix = load.skeleton(load.dense_config(model_config), dtype=load.checkpoint_dtype(model_config)).base_model_prefix
    index = open_index(folder)
    stay = {name_in_checkpoint(f"{path}.weight", index, prefix) for path in beside}
    with screen.bar("merging") as progress:
        merge_checkpoint(
            folder,
            out,
            {name: edit for name, edit in plan.changes.edits.items() if name not in stay},
            drop=plan.drop,
            config_updates=plan.changes.config,
            extra_files=tokenizer_files(merge_config, file, screen) | extra_files(folder, file),
            progress=progress,
        )


def template_of(config: ExportConfig, source: Source, tokenizer: ChatTokenizer) -> Template | None:
    """The template that goes with the result: the one that trained it, unless another is named; None for bare text."""
    return (
        resolve_template(config.template, tokenizer)
        if config.template != "auto"
        else trained_template(source, tokenizer)
    )


def trained_template(source: Source, tokenizer: ChatTokenizer) -> Template | None:
    """The one that worded what was trained on; of a base as it is, its own."""
    if "template" in source.card:
        trained = source.card["template"]
        return Template(trained["name"], trained["source"]) if trained else None
    return Template("own", tokenizer.own_template) if tokenizer.own_template else None
