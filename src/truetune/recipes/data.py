"""From the files a config names to tokenised examples, with a report whose numbers add up."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from truetune.config.sft import PretrainConfig, SFTConfig, TrainConfig
from truetune.data import rejects as rejected
from truetune.data.blocks import cut_into_blocks
from truetune.data.duplicates import duplicates
from truetune.data.formats import parse_rows
from truetune.data.length import limit_lengths
from truetune.data.mask import encode_rows
from truetune.data.read import read_rows
from truetune.data.schema import Reject, Row, TokenSet
from truetune.data.split import split
from truetune.data.template import Template, resolve_template
from truetune.errors import DataError
from truetune.models.tokenizer import ChatTokenizer
from truetune.train.log import Screen


@dataclass(frozen=True)
class Prepared:
    """What training and evaluation run on.

    ``report`` is the content of ``data/report.json`` without ``packing_fill``, which is known once the plan is.
    """

    train: TokenSet
    held_out: TokenSet | None
    template: Template | None
    rejects: list[Reject]
    report: dict[str, Any]

    @property
    def digest(self) -> str:
        """SHA-256 of the tokens and flags that are trained on: what a resumed run must find again."""
        digest = hashlib.sha256()
        for tensor in (self.train.tokens, self.train.trained, self.train.offsets):
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()


def prepare_sft(config: SFTConfig, tokenizer: ChatTokenizer, *, max_length: int, screen: Screen) -> Prepared:
    """Read, check, render and tokenise instruction data.

    Raises:
        DataError, TemplateError: naming file and row.
    """
    rows, rejects, read = _read(config, config.data, config.format)
    _say_duplicates(rows, screen)
    train_rows, held_rows = _held_out(config, config.format, rows)
    needs_template = any(row.messages for row in [*rows, *held_rows])
    template = resolve_template(config.template, tokenizer) if needs_template else None

    def encode(some: Sequence[Row], total: int) -> tuple[TokenSet, list[Reject]]:
        examples, unusable = encode_rows(some, template, tokenizer, train_on=config.train_on, system=config.system)
        rejected.raise_if_too_many([*rejects, *unusable], total, max_bad_rows=config.max_bad_rows)
        examples, long = limit_lengths(examples, max_length, config.on_overlong, screen.warn)
        return examples, [*unusable, *long]

    train, bad = encode(train_rows, read)
    held_out, held_bad = encode(held_rows, read) if held_rows else (None, [])
    rejects += [*bad, *(held_bad if config.val_split else [])]
    return _finish(config, read, train, held_out, template, rejects, tokenizer)


def prepare_pretrain(config: PretrainConfig, tokenizer: ChatTokenizer, *, max_length: int, screen: Screen) -> Prepared:
    """Read raw text, tokenise it and cut it into blocks of ``max_length``."""
    rows, rejects, read = _read(config, config.data, "text")
    rejected.raise_if_too_many(rejects, read, max_bad_rows=config.max_bad_rows)
    _say_duplicates(rows, screen)
    train_rows, held_rows = _held_out(config, "text", rows)
    train, bad = encode_rows(train_rows, None, tokenizer, train_on="all")
    held = encode_rows(held_rows, None, tokenizer, train_on="all")[0] if held_rows else None
    rejects += bad
    prepared = _finish(config, read, train, held, None, rejects, tokenizer)
    blocks = cut_into_blocks(train, max_length)
    held_blocks = cut_into_blocks(held, max_length) if held else None
    prepared.report.update(trained_tokens=blocks.trained_count(), max_length_seen=int(blocks.lengths.max()))
    return Prepared(blocks, held_blocks, None, rejects, prepared.report)


def _read(config: TrainConfig, paths: Sequence[str], form: str) -> tuple[list[Row], list[Reject], int]:
    raw, unreadable = read_rows(paths)
    rows, misfits = parse_rows(raw, form) if raw else ([], [])
    read = len(raw) + len(unreadable)
    rejects = [*unreadable, *misfits]
    rejected.raise_if_too_many(rejects, read, max_bad_rows=config.max_bad_rows)
    return rows, rejects, read


def _held_out(config: TrainConfig, form: str, rows: list[Row]) -> tuple[list[Row], list[Row]]:
    if config.val_data:
        if config.val_split:
            raise DataError("--val-split and --val-data are both given", ("way out", "keep one of the two"))
        return rows, _read(config, config.val_data, form)[0]
    train, held = split(rows, config.val_split) if config.val_split else (rows, [])
    if config.val_split and not (train and held):
        raise DataError(
            f"--val-split {config.val_split}: of {len(rows)} rows, {len(train)} are left to train on, {len(held)} held out",
            ("way out", "a larger share, more rows, or --val-data FILE"),
        )
    return train, held


def _say_duplicates(rows: Sequence[Row], screen: Screen) -> None:
    if repeats := duplicates(rows):
        named = "; ".join(f"{row} repeats row {first.row}" for row, first in repeats[:3])
        more = f"; … {len(repeats) - 3} more" if len(repeats) > 3 else ""
        screen.warn(f"{len(repeats)} rows say what another row says already: {named}{more}")


def _finish(
    config: TrainConfig,
    read: int,
    train: TokenSet,
    held_out: TokenSet | None,
    template: Template | None,
    rejects: list[Reject],
    tokenizer: ChatTokenizer,
) -> Prepared:
    if not train.trained_count():
        raise DataError(
            f"no row of {', '.join(config.data)} is left to train on",
            ("rejected", ", ".join(f"{n} {reason}" for reason, n in rejected.counts(rejects).items())),
        )
    report = {
        "read": read,
        "used": len(train) + (len(held_out) if held_out and config.val_split else 0),
        "rejected": rejected.counts(rejects),
        "tokens": len(train.tokens),
        "trained_tokens": train.trained_count(),
        "max_length_seen": int(train.lengths.max()),
        "held_out": {"rows": len(held_out), "tokens": len(held_out.tokens)} if held_out else None,
    }
    return Prepared(train, held_out, template, rejects, report)
