"""From the files a config names to tokenised examples, with a report whose numbers add up."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from truetune.config.sft import PretrainConfig, SFTConfig, TrainConfig
from truetune.data import rejects as rejected
from truetune.data.blocks import cut_into_blocks
from truetune.data.duplicates import duplicates, shared
from truetune.data.formats import parse_rows
from truetune.data.length import limit_lengths, truncation
from truetune.data.mask import encode_rows
from truetune.data.read import read_rows
from truetune.data.schema import Reject, Row, TokenSet
from truetune.data.sources import passed_over
from truetune.data.split import split
from truetune.data.template import Template, asks_for_date, pin_date, resolve_template
from truetune.errors import DataError
from truetune.models.tokenizer import ChatTokenizer
from truetune.train.log import Screen

Encode = Callable[[Sequence[Row]], tuple[TokenSet, list[Reject]]]
Limit = Callable[[TokenSet], tuple[TokenSet, list[Reject]]]


@dataclass(frozen=True)
class Prepared:
    """What training and evaluation run on.

    ``report`` is the content of ``data/report.json`` without ``packing_fill``, which is known once the plan is.
    ``system`` stands in front of conversations that have no system message, ``date`` is the day that the template
    tells; both are part of every prompt from then on.
    """

    train: TokenSet
    held_out: TokenSet | None
    template: Template | None
    rejects: list[Reject]
    report: dict[str, Any]
    system: str | None = None
    date: str | None = None

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
    """Read, check, render and tokenise instruction data.

    Args:
        date: the day (ISO) that a template tells, as the run was started with; today when None.
    Raises:
        DataError, TemplateError: naming file and row.
    """
    source, held = _sources(config, config.format, screen)
    needs_template = any(row.messages for row in [*source.rows, *held.rows])
    template = resolve_template(config.template, tokenizer) if needs_template else None
    dated = template is not None and asks_for_date(template)
    if template is not None and dated:
        date = date or datetime.now().date().isoformat()
        template = pin_date(template, date)
        screen.note(f"the template tells the date: it stays {date}, in this run and in every prompt of its result")
    encode = functools.partial(
        encode_rows, template=template, encoder=tokenizer, train_on=config.train_on, system=config.system
    )
    limit = functools.partial(limit_lengths, max_length=max_length, policy=config.on_overlong, say=screen.warn)
    prepared = _tokenise(config, source, held, encode, limit, template)
    return replace(prepared, system=config.system if template else None, date=date if dated else None)


def prepare_pretrain(
    config: PretrainConfig, tokenizer: ChatTokenizer, *, max_length: int, screen: Screen, date: str | None = None
) -> Prepared:
    """Read raw text, tokenise it and cut it into blocks of ``max_length``; there is no template to tell the date."""
    source, held = _sources(config, "text", screen)
    encode = functools.partial(encode_rows, template=None, encoder=tokenizer, train_on="all")
    whole = _tokenise(config, source, held, encode, lambda examples: (examples, []), None)
    blocks = cut_into_blocks(whole.train, max_length)
    held_blocks = cut_into_blocks(whole.held_out, max_length) if whole.held_out else None
    whole.report.update(trained_tokens=blocks.trained_count(), max_length_seen=int(blocks.lengths.max()))
    return Prepared(blocks, held_blocks, None, whole.rejects, whole.report)


@dataclass(frozen=True)
class _Source:
    """Rows that were understood, those that were not, and how many there were."""

    rows: list[Row]
    rejects: list[Reject]
    read: int


def _sources(config: TrainConfig, form: str, screen: Screen) -> tuple[_Source, _Source]:
    """``(to train on, held out)``; rows held out by ``--val-split`` were read, and are counted, with the first."""
    source = _read(config, config.data, form)
    if others := passed_over([*config.data, *config.val_data]):
        screen.warn(f"{len(others)} files are not data and are not read: {', '.join(others[:5])}")
    _say_duplicates(source.rows, screen)
    if config.val_data:
        held_out = _read(config, config.val_data, form)
        if both := shared(source.rows, held_out.rows):
            named = ", ".join(map(str, both[:3])) + (f", … {len(both) - 3} more" if len(both) > 3 else "")
            screen.warn(f"{len(both)} of {len(held_out.rows)} rows of --val-data are trained on too, so the held-out "
                        f"loss flatters the result: {named}")  # fmt: skip
        return source, held_out
    if not config.val_split:
        return source, _Source([], [], 0)
    train, held = split(source.rows, config.val_split)
    if not (train and held):
        raise DataError(
            f"--val-split {config.val_split:g}: of {len(source.rows)} rows, {len(train)} would be trained on and "
            f"{len(held)} held out",
            ("way out", "a larger share, more rows, or --val-data FILE"),
        )
    return _Source(train, source.rejects, source.read), _Source(held, [], 0)


def _read(config: TrainConfig, paths: Sequence[str], form: str) -> _Source:
    raw, unreadable = read_rows(paths)
    rows, misfits = parse_rows(raw, form) if raw else ([], [])
    rejects, read = [*unreadable, *misfits], len(raw) + len(unreadable)
    rejected.raise_if_too_many(rejects, read, max_bad_rows=config.max_bad_rows)
    return _Source(rows, rejects, read)


def _tokenise(
    config: TrainConfig, source: _Source, held: _Source, encode: Encode, limit: Limit, template: Template | None
) -> Prepared:
    train, bad = encode(source.rows)
    held_out, held_bad = encode(held.rows) if held.rows else (None, [])
    both, apart = ([*bad, *held_bad], []) if config.val_split else (bad, held_bad)
    rejected.raise_if_too_many([*source.rejects, *both], source.read, max_bad_rows=config.max_bad_rows)
    rejected.raise_if_too_many([*held.rejects, *apart], held.read, max_bad_rows=config.max_bad_rows)
    whole, held_whole = train, held_out
    train, long = limit(whole)
    held_out, held_long = limit(held_whole) if held_whole else (None, [])
    rejects, held_rejects = [*source.rejects, *bad, *long], [*held.rejects, *held_bad, *held_long]
    if not train.trained_count() or (held.rows and not held_out):
        emptied, why = (
            (config.val_data or config.data, held_rejects) if train.trained_count() else (config.data, rejects)
        )
        raise DataError(
            f"no row of {', '.join(emptied)} is left to {'hold out' if train.trained_count() else 'train on'}",
            ("left out", "\n".join(f"{r.origin}: {r.detail}" for r in why[:8])),
        )
    report = {
        "read": source.read,
        "used": len(train) + (len(held_out) if held_out and config.val_split else 0),
        "rejected": rejected.counts([*rejects, *held_rejects] if config.val_split else rejects),
        "tokens": len(train.tokens),
        "trained_tokens": train.trained_count(),
        "truncated": truncation(whole, train),
        "max_length_seen": int(train.lengths.max()),
        "held_out": None,
    }
    if held_out and held_whole:
        report["held_out"] = {"rows": len(held_out), "tokens": len(held_out.tokens),
                              "rejected": rejected.counts(held_rejects),
                              "truncated": truncation(held_whole, held_out)}  # fmt: skip
    return Prepared(train, held_out, template, [*rejects, *held_rejects], report)


def _say_duplicates(rows: Sequence[Row], screen: Screen) -> None:
    if repeats := duplicates(rows):
        named = "; ".join(f"{row} repeats row {first.row}" for row, first in repeats[:3])
        more = f"; … {len(repeats) - 3} more" if len(repeats) > 3 else ""
        screen.warn(f"{len(repeats)} rows say what another row says already: {named}{more}")
