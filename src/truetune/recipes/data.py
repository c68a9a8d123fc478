"""The data of a run: from the files a config names to tokenised examples, or to those an earlier run made of them."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from truetune.config.options import group_of
from truetune.config.sft import PretrainConfig, SFTConfig, TrainConfig
from truetune.data.blocks import cut_into_blocks
from truetune.data.length import limit_lengths
from truetune.data.mask import encode_rows
from truetune.data.schema import Reject, TokenSet
from truetune.data.sources import find_files, passed_over
from truetune.data.template import Template, asks_for_date, pin_date, resolve_template
from truetune.data.token_cache import Tokenised, key_of, through_cache
from truetune.errors import DataError, TemplateError
from truetune.models.tokenizer import ChatTokenizer
from truetune.recipes.tokenise import Told, sources, tokenise
from truetune.train.log import Screen

# Settings in the group about data that the tokens do not depend on.
_LATER = ("packing",)


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
    rejects: list[Reject]
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
    digest = hashlib.sha256()
    for tensor in (examples.tokens, examples.trained, examples.offsets):
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def prepare_sft(
    config: SFTConfig, tokenizer: ChatTokenizer, *, max_length: int, screen: Screen, date: str | None = None
) -> Prepared:
    """Read, check, render and tokenise instruction data, or take what an earlier run made of it.

    Args:
        date: the day (ISO) that a template tells, as the run was started with; today when None.
    Raises:
        DataError, TemplateError: naming file and row.
    """
    today = date or datetime.now().date().isoformat()
    wording = functools.cache(lambda: _wording(config, tokenizer, today))  # one reading, for tokens, key and result

    def build(told: Told) -> Tokenised:
        source, held = sources(config, config.format, told)
        templated = any(row.messages for row in [*source.rows, *held.rows])
        template, day = wording() if templated else (None, None)
        if day:
            told.note(f"the template tells the date: it stays {day}, in this run and in every prompt of its result")
        encode = functools.partial(
            encode_rows, template=template, encoder=tokenizer, train_on=config.train_on, system=config.system
        )
        limit = functools.partial(limit_lengths, max_length=max_length, policy=config.on_overlong, say=told.warn)
        return replace(tokenise(config, source, held, encode, limit), templated=templated)

    made, cached = _made(functools.partial(_key, config, tokenizer, max_length, wording), build, screen)
    template, day = wording() if made.templated else (None, None)
    system = config.system if made.templated else None
    return Prepared(made.train, made.held_out, template, made.rejects, made.report, system, day, cached)


def prepare_pretrain(
    config: PretrainConfig, tokenizer: ChatTokenizer, *, max_length: int, screen: Screen, date: str | None = None
) -> Prepared:
    """Read raw text, tokenise it and cut it into blocks of ``max_length``; there is no template to tell the date."""

    def build(told: Told) -> Tokenised:
        source, held = sources(config, "text", told)
        encode = functools.partial(encode_rows, template=None, encoder=tokenizer, train_on="all")
        whole = tokenise(config, source, held, encode, lambda examples: (examples, []))
        blocks = cut_into_blocks(whole.train, max_length)
        held_blocks = cut_into_blocks(whole.held_out, max_length) if whole.held_out else None
        whole.report.update(trained_tokens=blocks.trained_count(), max_length_seen=int(blocks.lengths.max()))
        return replace(whole, train=blocks, held_out=held_blocks)

    made, cached = _made(functools.partial(_key, config, tokenizer, max_length), build, screen)
    return Prepared(made.train, made.held_out, None, made.rejects, made.report, cached=cached)


def _made(key: Callable[[], str | None], build: Callable[[Told], Tokenised], screen: Screen) -> tuple[Tokenised, bool]:
    """The data, and whether it is from the cache; either way the user is told the same."""

    def told_too() -> Tokenised:
        told = Told(screen)
        return replace(build(told), told=tuple(told.lines))

    made, cached = through_cache(key, told_too)
    if cached:
        say = {"note": screen.note, "warn": screen.warn}
        for kind, text in made.told:
            say[kind](text)
    return made, cached


def _key(
    config: TrainConfig,
    tokenizer: ChatTokenizer,
    max_length: int,
    wording: Callable[[], tuple[Template, str | None]] | None = None,
) -> str | None:
    """The key to all that the tokens depend on; None where a part of it can't be told: building will say why."""
    if tokenizer.identity is None:
        return None
    try:
        files = [find_files(paths) for paths in (config.data, config.val_data) if paths]
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
    }
    return key_of(decisions, [file for found in files for file in found])


def _wording(config: SFTConfig, tokenizer: ChatTokenizer, today: str) -> tuple[Template, str | None]:
    """The template, and the day that it tells where it tells one."""
    template = resolve_template(config.template, tokenizer)
    return (pin_date(template, today), today) if asks_for_date(template) else (template, None)
