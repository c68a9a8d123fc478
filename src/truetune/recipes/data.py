"""The data of a run: from the files a config names to tokenised examples, or to those an earlier run made of them."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from truetune.config.options import group_of
from truetune.config.sft import PretrainConfig, SFTConfig, TrainConfig
from truetune.data.blocks import cut_into_blocks
from truetune.data.compressed import PACKINGS
from truetune.data.fim import FillInTheMiddle
from truetune.data.intake import Intake
from truetune.data.length import limit_lengths
from truetune.data.mask import encode_rows
from truetune.data.schema import Reject, Row, TokenSet
from truetune.data.shards import MappedSet
from truetune.data.shards_made import Encode, ShardMaker
from truetune.data.sources import find_files, find_sources, passed_over
from truetune.data.template import Template, asks_for_date, pin_date, resolve_template, without_thinking
from truetune.data.token_cache import key_of, through_cache
from truetune.data.token_files import Tokenised
from truetune.errors import ConfigError, DataError, TemplateError
from truetune.models.tokenizer import ChatTokenizer
from truetune.recipes.tokenise import Limit, Told, intake, sources, tokenise
from truetune.recipes.tokenise_shards import tokenise_in
from truetune.train.log import Screen

# Settings in the group about data that the tokens do not depend on.
_LATER = ("packing",)
LARGE = 4 << 20  # bytes of the files, from which on several processes are worth their start
_PACKED = (*PACKINGS, ".parquet")


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
) -> Prepared:
    """Read, check, render and tokenise instruction data, or take what an earlier run made of it.

    Args:
        date: the day (ISO) that a template tells, as the run was started with; today when None.
        card: of the adapter that is trained on, whose template is taken unless another is named.
    Raises:
        DataError, TemplateError: naming file and row.
    """
    today = date or datetime.now().date().isoformat()
    # One reading, for tokens, key and result.
    wording = functools.cache(lambda: _wording(config, tokenizer, today, card or {}))

    retold = FillInTheMiddle.of(tokenizer, config.fim_rate, seed=config.seed)
    encode = functools.partial(
        encode_rows, encoder=tokenizer, train_on=config.train_on, system=config.system, retold=retold
    )

    def say_read(told: Told, templated: bool) -> None:
        if templated and config.text_blocks:
            raise ConfigError(
                "--text-blocks: there are conversations among the rows, and only texts are joined and cut",
                ("way out", "no --text-blocks: rows share micro-batches without padding anyway"),
                ("or", "--format text, where the rows have a text as well"),
            )
        if config.text_blocks:
            told.note(f"texts are joined, and cut into blocks of {max_length:,} tokens")
        if templated and config.fim_rate:
            told.warn("--fim-rate: the conversations among the rows stay as they are; it is for texts alone")
        if templated and (day := wording()[1]):
            told.note(f"the template tells the date: it stays {day}, in this run and in every prompt of its result")

    def limit(told: Told) -> Limit:
        if config.text_blocks:
            return _no_limit
        return functools.partial(
            limit_lengths, max_length=max_length, policy=config.on_overlong, say=told.warn, decode=tokenizer.decode
        )

    def finished(made: Tokenised) -> Tokenised:
        return _in_blocks(made, max_length) if config.text_blocks else made

    def build(told: Told) -> Tokenised:
        source, held = sources(config, config.format, told)
        templated = any(row.messages for row in [*source.rows, *held.rows])
        template = wording()[0] if templated else None
        say_read(told, templated)
        encoded = functools.partial(encode, template=template)
        return replace(finished(tokenise(config, source, held, encoded, limit(told))), templated=templated)

    def build_in(told: Told, work: Path) -> Tokenised:
        maker = functools.partial(_maker, intake(config), config.format, _encoder(encode, wording))
        return finished(
            tokenise_in(config, work, told, maker=maker, limit=limit(told), when_read=functools.partial(say_read, told))
        )

    made, cached = _made(
        functools.partial(_key, config, tokenizer, max_length, wording), build,
        build_in if is_large(config) else None, screen,
    )  # fmt: skip
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
) -> Prepared:
    """Read raw text, tokenise it and cut it into blocks of ``max_length``; there is no template to tell the date."""

    retold = FillInTheMiddle.of(tokenizer, config.fim_rate, seed=config.seed)
    encode = functools.partial(encode_rows, template=None, encoder=tokenizer, train_on="all", retold=retold)

    def build(told: Told) -> Tokenised:
        return _in_blocks(tokenise(config, *sources(config, "text", told), encode, _no_limit), max_length)

    def build_in(told: Told, work: Path) -> Tokenised:
        maker = functools.partial(_maker, intake(config), "text", encode)
        return _in_blocks(
            tokenise_in(config, work, told, maker=maker, limit=_no_limit, when_read=lambda templated: None), max_length
        )

    made, cached = _made(
        functools.partial(_key, config, tokenizer, max_length), build, build_in if is_large(config) else None, screen
    )
    return Prepared(made.train, made.held_out, None, made.rejects, made.report, cached=cached)


def _no_limit(examples: TokenSet) -> tuple[TokenSet, list[Reject]]:
    """Texts of any length: they are cut into blocks."""
    return examples, []


def _in_blocks(whole: Tokenised, max_length: int) -> Tokenised:
    blocks = cut_into_blocks(whole.train, max_length)
    held_blocks = cut_into_blocks(whole.held_out, max_length) if whole.held_out else None
    whole.report.update(trained_tokens=blocks.trained_count(), max_length_seen=int(blocks.lengths.max()))
    return replace(whole, train=blocks, held_out=held_blocks)


def is_large(config: TrainConfig) -> bool:
    """Whether the files are worth several processes, and their tokens are kept in files: a packed one counts fourfold.

    Files that can't be found are none: whoever reads them will say so.
    """
    try:
        files = [file for paths in (config.data, config.val_data) if paths for file in find_files(paths)]
        return sum(os.path.getsize(file) * (4 if file.endswith(_PACKED) else 1) for file in files) > LARGE
    except (DataError, OSError):
        return False


@dataclass(frozen=True)
class _Encoder:
    """Rows into tokens, by a template that may be missing as long as no row needs it."""

    encode: functools.partial[tuple[TokenSet, list[Reject]]]
    template: Template | None
    missing: TemplateError | None

    def __call__(self, rows: Sequence[Row]) -> tuple[TokenSet, list[Reject]]:
        if self.missing and any(row.messages for row in rows):
            raise self.missing
        return self.encode(rows, template=self.template)


def _encoder(
    encode: functools.partial[tuple[TokenSet, list[Reject]]], wording: Callable[[], tuple[Template, str | None]]
) -> _Encoder:
    try:
        return _Encoder(encode, wording()[0], None)
    except TemplateError as error:
        return _Encoder(encode, None, error)


def _maker(parse: Intake, form: str, encode: Encode, folder: Path, share: float) -> ShardMaker:
    return ShardMaker(folder, parse, encode, form=form, share=share, choices={})


def _made(
    key: Callable[[], str | None],
    build: Callable[[Told], Tokenised],
    build_in: Callable[[Told, Path], Tokenised] | None,
    screen: Screen,
) -> tuple[Tokenised, bool]:
    """The data, and whether it is from the cache; either way the user is told the same."""

    def told_too(make: Callable[[Told], Tokenised]) -> Tokenised:
        told = Told(screen)
        return replace(make(told), told=tuple(told.lines))

    def told_in(work: Path) -> Tokenised:
        assert build_in is not None
        return told_too(lambda told: build_in(told, work))

    made, cached = through_cache(
        key,
        lambda: told_too(build),
        build_in=told_in if build_in else None,
        waits=lambda: screen.note("another process is making these tokens: waiting for them"),
    )
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


def _wording(
    config: SFTConfig, tokenizer: ChatTokenizer, today: str, card: Mapping[str, Any]
) -> tuple[Template, str | None]:
    """The template, and the day that it tells where it tells one; unless another is named, those of ``card``."""
    if config.template == "auto" and (trained := card.get("template")):
        return Template(trained["name"], trained["source"]), card.get("date")
    template = resolve_template(config.template, tokenizer)
    if config.thinking == "drop":
        template = replace(template, source=without_thinking(template.source))
    return (pin_date(template, today), today) if asks_for_date(template) else (template, None)
