"""Which models can be asked, by name: the base, and adapters that were named or that lie in a folder.

A name that a request brings is compared with those that are there, and never becomes part of a path. Each adapter words
its prompts with the template it was trained on.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from truetune.adapters import files
from truetune.adapters.vocabulary import NewTokens
from truetune.config.generate import AnswerGroup
from truetune.config.serve import NAME, ServeConfig
from truetune.errors import AdapterError, ConfigError, TruetuneError, nearest
from truetune.generate.engine import Engine
from truetune.generate.loaded import Stamp
from truetune.generate.shelf import stamp_of
from truetune.models import load
from truetune.recipes.adapter import check_base, check_template, check_tokenizer
from truetune.recipes.generate import Speaker, load_speaker, template_of
from truetune.serve.refusal import Refusal, unavailable
from truetune.train.log import Screen

_TRIES = 3


@dataclass(frozen=True)
class Voice:
    """A model under its name: how its prompts are worded, and which adapter answers them."""

    name: str
    speaker: Speaker
    adapter: str | None = None  # as the engine knows it; None for the base
    stamp: Stamp = ()
    created: int = field(default_factory=lambda: int(time.time()))


@dataclass(frozen=True)
class Shelves:
    """Where adapters are."""

    named: Mapping[str, Path]
    folders: tuple[Path, ...]

    @classmethod
    def of(cls, settings: tuple[str, ...]) -> Shelves:
        """Read ``--adapters``.

        Raises:
            ConfigError: no such folder, a name that can't be one, or the same name twice.
        """
        named: dict[str, Path] = {}
        folders = []
        for setting in settings:
            name, equals, path = setting.partition("=")
            folder = Path(path if equals else setting).expanduser()
            if not folder.is_dir():
                raise ConfigError(f"--adapters {setting}: there is no folder {folder}")
            if not equals and not (folder / files.CONFIG).is_file():
                folders.append(folder)
                continue
            name = name if equals else folder.resolve().name
            if not NAME.fullmatch(name):
                raise ConfigError(f"--adapters {setting}: {name!r} can't be a model's name",
                                  ("expected", "letters, digits, and . _ : - in between"))  # fmt: skip
            if name in named:
                raise ConfigError(f"--adapters: two are called {name}", ("way out", "OTHER_NAME=DIR"))
            named[name] = folder
        return cls(named, tuple(folders))

    def find(self) -> dict[str, Path]:
        """Name → folder of every adapter that is there now; the first of a name counts."""
        found = dict(self.named)
        for folder in self.folders:
            try:
                entries = sorted(folder.iterdir())
            except OSError:
                continue
            for entry in entries:
                if NAME.fullmatch(entry.name) and (entry / files.CONFIG).is_file():
                    found.setdefault(entry.name, entry)
        return found


class Catalogue:
    """The voices of a server. Every method may take as long as a disk does, and comes from any thread.

    Args:
        base: what answers without an adapter.
        name: what it is called.
    """

    def __init__(self, config: ServeConfig, base: Speaker, *, name: str, engine: Engine, screen: Screen) -> None:
        self._config, self._engine, self._screen = config, engine, screen
        self.base = Voice(name, base)
        self._shelves = Shelves.of(config.adapters)
        self._folder = load.local_copy(config.model, revision=config.revision)
        self._voices: dict[str, Voice] = {}
        self._lock = threading.Lock()
        if name in self._shelves.named:
            raise ConfigError(f"--adapters: {name} is what the base is called", ("way out", "--served-name"))

    def names(self) -> list[str]:
        """The base, then every adapter that is there."""
        return [self.base.name, *(name for name in self._shelves.find() if name != self.base.name)]

    def get(self, name: str) -> Voice:
        """A model as it is now: an adapter that is new is loaded, one that changed is read again.

        Raises:
            Refusal: 404 for a name that is not there, 503 for an adapter that can't be loaded.
        """
        if name == self.base.name:
            return self.base
        with self._lock:
            folder = self._shelves.find().get(name)
            if folder is None:
                self._forget(name)
                raise _unknown(name, self.names())
            known, stamp = self._voices.get(name), stamp_of(folder)
            if known is not None and known.stamp == stamp:
                return known
            try:
                self._voices[name] = self._load(name, folder)
            except TruetuneError as error:
                raise unavailable(name, error) from None
            return self._voices[name]

    def load_all(self) -> None:
        """Load what was named, which has to be right; what was found in a folder is loaded when it is asked for, and
        warned of now where its settings say already that it does not belong to this base.

        Raises:
            TruetuneError: what is wrong with one that was named.
        """
        found = self._shelves.find()
        for folder in self._shelves.folders:
            if not any(path.parent == folder for path in found.values()):
                self._screen.note(f"{folder} holds no adapter yet; one that is put there is served")
        for name, folder in found.items():
            if name in self._shelves.named:
                self._voices[name] = self._load(name, folder)
                continue
            try:
                self._speaker(files.read(folder))
            except TruetuneError as error:
                self._screen.warn(f"{name} is not served: {error}")

    def _load(self, name: str, folder: Path) -> Voice:
        """Wording and weights from one state of the files."""
        for _ in range(_TRIES):
            real = folder.resolve()
            stamp, speaker = stamp_of(real), self._speaker(files.read(real, mapped=False))
            if self._engine.adapters.register(name, folder).stamp == stamp:
                return Voice(name, speaker, name, stamp)
        raise AdapterError(f"{folder} is written to while it is read")

    def _speaker(self, file: files.AdapterFile) -> Speaker:
        """How an adapter's prompts are worded: as in its training.

        Raises:
            AdapterError, TemplateError: it does not belong to this base.
        """
        config, base = self._config, self.base.speaker
        check_base(file, config.model, self._folder, allowed=config.allowed)
        check_tokenizer(file, base.tokenizer, allowed=config.allowed)
        if NewTokens.of_card(file.card) is not None or files.brings_rows(base.model, file):
            raise AdapterError(f"{file.folder} brings tokens that the base does not have, which others would see too",
                               ("way out", "truetune merge, and serve the merged model"))  # fmt: skip
        template = template_of(config.template, file.card, base.tokenizer, self._screen)
        check_template(file, template, allowed=config.allowed)
        stop_ids = base.stop_ids | frozenset(int(i) for i in file.card.get("stop_ids", ()))
        return replace(base, template=template, stop_ids=stop_ids, system=file.card.get("system"))

    def _forget(self, name: str) -> None:
        if self._voices.pop(name, None) is not None:
            self._engine.adapters.unregister(name)


def load_base(config: ServeConfig, screen: Screen) -> Speaker:
    """The base, ready to answer."""
    settings = ("model", "revision", "dtype", "device", "template", "quant", "double_quant", "quant_skip")
    return load_speaker(AnswerGroup(**{name: getattr(config, name) for name in settings}), screen)


def _unknown(name: str, names: list[str]) -> Refusal:
    close = nearest(name, names)
    hint = f"did you mean {close!r}?" if close else "/v1/models lists those that there are"
    said = repr(name) if len(name) <= 80 else f"{name[:77]!r}…"
    return Refusal(404, f"there is no model {said}; {hint}", param="model", code="model_not_found")
