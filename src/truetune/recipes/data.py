"""The data of a run: from the files a config names to tokenised examples, or to those an earlier run made of them."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Any

from truetune.config.options import group_of
from truetune.config.sft import PretrainConfig, SFTConfig, TrainConfig
from truetune.data.compressed import PACKINGS
from truetune.data.rejects import Rejects
from truetune.data.shards import MappedSet
from truetune.data.sources import find_files, find_sources, passed_over
from truetune.data.standard_input import path_of
from truetune.data.template import Template
from truetune.data.token_cache import key_of, through_cache
from truetune.data.token_files import Tokenised
from truetune.data.token_set import TokenSet
from truetune.errors import DataError, TemplateError
from truetune.models.tokenizer import ChatTokenizer
from truetune.recipes.tokenise import Told
from truetune.recipes.wording import Instructions, Texts, Wording, wording_of
from truetune.train.log import Screen

# Settings in the group about data that the tokens do not depend on.
_LATER = ("packing",)
LARGE = 4 << 20  # bytes of the files, from which on several processes are worth their start
_PACKED = (*PACKINGS, ".parquet")
_States = dict[str, tuple[int, int, int]]  # of files: inode, size, time of the last change


@dataclass(frozen=True)
class Prepared:
    """What training and evaluation run on.

    ``report`` is the content of ``data/report.json`` without ``packing_fill``, which is known once the plan is.
    ``system`` stands in front of conversations that have no system message, ``date`` is the day that the template
    tells; both are part of every prompt from then on. ``cached`` says that an earlier run had made the tokens.
    """

    train: TokenSet
    held_out: TokenSet | None
    template: Template | None
    rejects: Rejects
    report: dict[str, Any]
    system: str | None = None
    date: str | None = None
    cached: bool = False

    @property
    def digest(self) -> str:
        """SHA-256 of the tokens and flags that are trained on: what a resumed run must find again."""
        return _digest(self.train)

    @property
    def held_out_digest(self) -> str | None:
        """The same of the held-out rows: which state is the best depends on them."""
        return _digest(self.held_out) if self.held_out else None


def _digest(examples: TokenSet) -> str:
    if isinstance(examples, MappedSet):
        return examples.digest
    digest = hashlib.sha256()
    for tensor in (examples.tokens, examples.trained, examples.offsets):
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def prepare_sft(
    config: SFTConfig,
    tokenizer: ChatTokenizer,
    *,
    max_length: int,
    screen: Screen,
    date: str | None = None,
    card: Mapping[str, Any] | None = None,
    most: int | None = None,
) -> Prepared:
    """Read, check, render and tokenise instruction data, or take what an earlier run made of it.

    Args:
        date: the day (ISO) that a template tells, as the run was started with; today when None.
        card: of the adapter that is trained on, whose template is taken unless another is named.
        most: tokens of the longest example that the model has room for, where that is known.
    Raises:
        DataError, TemplateError: naming file and row.
    """
    today = date or datetime.now().date().isoformat()
    # One reading, for tokens, key and result.
    wording = functools.cache(lambda: wording_of(config, tokenizer, today, card or {}))
    how = Instructions(config, tokenizer, max_length, wording, most)
    made, cached = _made(functools.partial(_key, config, tokenizer, max_length, wording), how, screen)
    template, day = wording() if made.templated else (None, None)
    system = config.system if made.templated else None
    return Prepared(made.train, made.held_out, template, made.rejects, made.report, system, day, cached)


def prepare_pretrain(
    config: PretrainConfig,
    tokenizer: ChatTokenizer,
    *,
    max_length: int,
    screen: Screen,
    date: str | None = None,
    card: Mapping[str, Any] | None = None,
    most: int | None = None,
) -> Prepared:
    """Read raw text, tokenise it and cut it into blocks of ``max_length``.

    There is no template to tell the date or to be in ``card``, and no text that could be longer than ``most``.
    """
    how = Texts(config, tokenizer, max_length)
    made, cached = _made(functools.partial(_key, config, tokenizer, max_length), how, screen)
    return Prepared(made.train, made.held_out, None, made.rejects, made.report, cached=cached)


def is_large(config: TrainConfig) -> bool:
    """Whether the files are worth several processes, and their tokens are kept in files: a packed one counts fourfold.

    Files that can't be found are none: whoever reads them will say so.
    """
    try:
        files = [file for paths in (config.data, config.val_data) if paths for file in find_files(paths)]
        return sum(os.path.getsize(path_of(file)) * (4 if file.endswith(_PACKED) else 1) for file in files) > LARGE
    except (DataError, OSError):
        return False


def _made(key: Callable[[], str | None], how: Instructions | Texts, screen: Screen) -> tuple[Tokenised, bool]:
    """The data, and whether it is from the cache; either way the user is told the same."""

    def told_too(make: Callable[[Told], Tokenised]) -> Tokenised:
        told = Told(screen)
        return replace(make(told), told=tuple(told.lines))

    before = _states(how.config)
    made, cached = through_cache(
        key,
        lambda: told_too(how.build),
        build_in=(lambda work: told_too(lambda told: how.build_in(told, work))) if is_large(how.config) else None,
        waits=lambda: screen.note("another process is making these tokens: waiting for them"),
    )
    if not cached:
        _raise_if_changed(before, _states(how.config))
    if cached:
        say = {"note": screen.note, "warn": screen.warn}
        for kind, text in made.told:
            say[kind](text)
    return made, cached


def _raise_if_changed(before: _States, now: _States) -> None:
    """A file that is gone by now was read whole, or reading it failed."""
    if changed := [name for name, state in before.items() if now.get(name, state) != state]:
        raise DataError(
            f"{', '.join(changed[:5])}: changed while being read, so the rows may be partly old and partly new",
            ("way out", "the same command again, once nothing writes there any more"),
        )


def _states(config: TrainConfig) -> _States:
    """Of each data file what changes when it is written to; none where they can't be found: reading will say why."""
    try:
        files = {file for paths in (config.data, config.val_data) if paths for file in find_files(paths)}
        stats = {file: os.stat(path_of(file)) for file in files}
    except (DataError, OSError):
        return {}
    return {file: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for file, stat in stats.items()}


def _key(
    config: TrainConfig,
    tokenizer: ChatTokenizer,
    max_length: int,
    wording: Wording | None = None,
) -> str | None:
    """The key to all that the tokens depend on; None where a part of it can't be told: building will say why."""
    if tokenizer.identity is None:
        return None
    try:
        files = [find_files(paths) for paths in (config.data, config.val_data) if paths]
        named = find_sources([*config.data, *config.val_data])
        others = passed_over([*config.data, *config.val_data])
    except (DataError, OSError):
        return None
    try:
        template = wording()[0].source if wording else None
    except TemplateError:  # which is no error unless a row needs it
        template = None
    names = {n for n, info in type(config).model_fields.items() if group_of(info) == "dataset" and n not in _LATER}
    decisions = {
        "command": config.command,
        "settings": config.model_dump(mode="json", include=names),
        "max_length": max_length,
        "template": template,
        "tokenizer": tokenizer.identity,
        "files": files,
        "passed_over": others,
        "sources": [asdict(source) for source in named],
        "seed": config.seed if config.fim_rate or any(source.weight < 1 for source in named) else None,
    }
    return key_of(decisions, [file for found in files for file in found])
