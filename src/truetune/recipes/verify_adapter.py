"""An adapter on its base: the trained model itself, and copies of it in other forms, such as the one for servers."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch

from truetune.adapters import files
from truetune.config.generate import GenerateConfig
from truetune.config.resolve import resolve
from truetune.data.template import Template, with_default_system
from truetune.errors import TruetuneError
from truetune.export.onto import recipe_of
from truetune.models.precision import name_of
from truetune.recipes.generate import Speaker, load_speaker
from truetune.recipes.verify_reference import Sample
from truetune.recipes.verify_subjects import Loaded, Opening
from truetune.train.log import Screen


def is_adapter(path: Path) -> bool:
    """An adapter's folder, or one with an adapter and the base that it is for, as ``--to peft-serving`` writes it."""
    return (path / files.CONFIG).is_file() or _with_base(path)


def _with_base(path: Path) -> bool:
    return (path / "adapter" / files.CONFIG).is_file() and (path / "base" / "config.json").is_file()


@dataclass
class LoadedAdapter(Loaded):
    """A base and an adapter that brings the template it was trained with."""

    template: Template | None = None
    system: str | None = None

    def prompt(self, sample: Sample) -> tuple[str | None, list[int] | int] | None:
        """By the adapter's own template."""
        if not sample.messages or self.template is None:
            return super().prompt(sample) if not sample.messages else ("the adapter has no template", [])
        source = with_default_system(self.template.source, self.system)
        try:
            tools = list(sample.tools) or None
            text = self.tokenizer.render(list(sample.messages), source, tools=tools, prompt=True)
        except TruetuneError as error:
            return error.message[:200], []
        return text, self.tokenizer.encode([text])[0]


def open_adapter(opening: Opening) -> Loaded:
    """Another adapter than the run's own, on the base that it names, as precisely as the run computed."""
    path = opening.path / "adapter" if _with_base(opening.path) else opening.path
    file = files.read(path)
    base = str(opening.path / "base") if _with_base(opening.path) else opening.target.base
    speaker = load_trained(base, file, opening, Screen())
    kind = name_of(getattr(torch, opening.compute))
    return LoadedAdapter(
        str(opening.path), "truetune", kind, speaker.model, speaker.tokenizer, speaker.stop_ids,
        template=speaker.template, system=speaker.system,
    )  # fmt: skip


def load_trained(
    base: str, file: files.AdapterFile | None, opening: Opening, screen: Screen, *, allowed: Collection[str] = ()
) -> Speaker:
    """Base and adapter as anybody would load them, packed as the base was while it was trained."""
    recipe = recipe_of(file.card) if file else None
    packed = {"quant": recipe.kind, "double_quant": recipe.double, "quant_skip": recipe.skip} if recipe else {}
    if recipe and recipe.of_checkpoint:
        packed = {}
    flags = {
        "model": base, "revision": opening.revision, "dtype": opening.compute, "device": opening.device, "prompt": "",
        "allow_mismatch": sorted(allowed) if file else [], **({"adapter": str(file.folder)} if file else {}), **packed,
    }  # fmt: skip
    return load_speaker(resolve(GenerateConfig, file=None, flags=flags).config, screen)
