"""Rows into tokens as the settings of a run ask: instructions by a template, texts as they are or joined and cut."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from truetune.config.sft import PretrainConfig, SFTConfig
from truetune.data.blocks import cut_into_blocks
from truetune.data.fim import FillInTheMiddle
from truetune.data.intake import Intake
from truetune.data.length import limit_lengths
from truetune.data.mask import encode_rows
from truetune.data.schema import Reject, Row
from truetune.data.shards_made import Encode, ShardMaker
from truetune.data.template import Template, asks_for_date, pin_date, resolve_template, without_thinking
from truetune.data.token_files import Tokenised
from truetune.data.token_set import TokenSet
from truetune.errors import ConfigError, TemplateError
from truetune.models.tokenizer import ChatTokenizer
from truetune.recipes.tokenise import Limit, Told, intake, sources, tokenise
from truetune.recipes.tokenise_shards import tokenise_in

Wording = Callable[[], tuple[Template, str | None]]  # the template, and the day that it tells where it tells one


@dataclass(frozen=True)
class Instructions:
    """Instruction data: rows worded by a template, and limited in length.

    Attributes:
        wording: asked only where a row needs it.
        most: tokens that the model was made for, where that is known.
    """

    config: SFTConfig
    tokenizer: ChatTokenizer
    max_length: int
    wording: Wording
    most: int | None = None

    def build(self, told: Told) -> Tokenised:
        """The tokens of all rows, in memory."""
        source, held = sources(self.config, self.config.format, told)
        templated = any(row.messages for row in [*source.rows, *held.rows])
        template = self.wording()[0] if templated else None
        self._say_read(told, templated)
        encode = functools.partial(self._encode, template=template)
        made = tokenise(self.config, source, held, encode, self._limit(told))
        return replace(self._finished(made), templated=templated)

    def build_in(self, told: Told, work: Path) -> Tokenised:
        """The same in files, made in the folder ``work``."""
        maker = functools.partial(_maker, intake(self.config), self.config.format, _encoder(self._encode, self.wording))
        read = functools.partial(self._say_read, told)
        return self._finished(
            tokenise_in(self.config, work, told, maker=maker, limit=self._limit(told), when_read=read)
        )

    @property
    def _encode(self) -> functools.partial[tuple[TokenSet, list[Reject]]]:
        config = self.config
        retold = FillInTheMiddle.of(self.tokenizer, config.fim_rate, seed=config.seed)
        return functools.partial(
            encode_rows, encoder=self.tokenizer, train_on=config.train_on, system=config.system, retold=retold
        )

    def _say_read(self, told: Told, templated: bool) -> None:
        if templated and self.config.text_blocks:
            raise ConfigError(
                "--text-blocks: there are conversations among the rows, and only texts are joined and cut",
                ("way out", "no --text-blocks: rows share micro-batches without padding anyway"),
                ("or", "--format text, where the rows have a text as well"),
            )
        if self.config.text_blocks:
            told.note(f"texts are joined, and cut into blocks of {self.max_length:,} tokens")
        if templated and self.config.fim_rate:
            told.warn("--fim-rate: the conversations among the rows stay as they are; it is for texts alone")
        if templated and (day := self.wording()[1]):
            told.note(f"the template tells the date: it stays {day}, in this run and in every prompt of its result")

    def _limit(self, told: Told) -> Limit:
        if self.config.text_blocks:
            return _no_limit
        return functools.partial(
            limit_lengths, max_length=self.max_length, policy=self.config.on_overlong, say=told.warn,
            decode=self.tokenizer.decode, most=self.most,
        )  # fmt: skip

    def _finished(self, made: Tokenised) -> Tokenised:
        return _in_blocks(made, self.max_length) if self.config.text_blocks else made


@dataclass(frozen=True)
class Texts:
    """Raw texts, joined and cut into blocks; there is no template."""

    config: PretrainConfig
    tokenizer: ChatTokenizer
    max_length: int

    def build(self, told: Told) -> Tokenised:
        """The tokens of all rows, in memory."""
        made = tokenise(self.config, *sources(self.config, "text", told), self._encode, _no_limit)
        return _in_blocks(made, self.max_length)

    def build_in(self, told: Told, work: Path) -> Tokenised:
        """The same in files, made in the folder ``work``."""
        maker = functools.partial(_maker, intake(self.config), "text", self._encode)
        made = tokenise_in(self.config, work, told, maker=maker, limit=_no_limit, when_read=lambda templated: None)
        return _in_blocks(made, self.max_length)

    @property
    def _encode(self) -> Encode:
        retold = FillInTheMiddle.of(self.tokenizer, self.config.fim_rate, seed=self.config.seed)
        return functools.partial(encode_rows, template=None, encoder=self.tokenizer, train_on="all", retold=retold)


def wording_of(
    config: SFTConfig, tokenizer: ChatTokenizer, today: str, card: Mapping[str, Any]
) -> tuple[Template, str | None]:
    """The template, and the day that it tells where it tells one; unless another is named, those of ``card``."""
    if config.template == "auto" and (trained := card.get("template")):
        return Template(trained["name"], trained["source"]), card.get("date")
    template = resolve_template(config.template, tokenizer)
    if config.thinking == "drop":
        template = replace(template, source=without_thinking(template.source))
    return (pin_date(template, today), today) if asks_for_date(template) else (template, None)


def _no_limit(examples: TokenSet, *, texts: bool) -> tuple[TokenSet, list[Reject]]:
    """Texts of any length: they are cut into blocks."""
    return examples, []


def _in_blocks(whole: Tokenised, max_length: int) -> Tokenised:
    blocks = cut_into_blocks(whole.train, max_length)
    held_blocks = cut_into_blocks(whole.held_out, max_length) if whole.held_out else None
    whole.report.update(trained_tokens=blocks.trained_count(), max_length_seen=blocks.longest())
    return replace(whole, train=blocks, held_out=held_blocks)


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


def _encoder(encode: functools.partial[tuple[TokenSet, list[Reject]]], wording: Wording) -> _Encoder:
    try:
        return _Encoder(encode, wording()[0], None)
    except TemplateError as error:
        return _Encoder(encode, None, error)


def _maker(parse: Intake, form: str, encode: Encode, folder: Path, share: float) -> ShardMaker:
    return ShardMaker(folder, parse, encode, form=form, share=share, choices={})
