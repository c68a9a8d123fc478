"""Raw rows into tokens: read, checked, split, rendered, limited, with a report whose numbers add up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from truetune.config.sft import TrainConfig
from truetune.data import rejects as rejected
from truetune.data.duplicates import duplicates, shared
from truetune.data.formats import parse_rows
from truetune.data.length import truncation
from truetune.data.read import read_rows
from truetune.data.schema import Reject, Row, TokenSet
from truetune.data.sources import passed_over
from truetune.data.split import split
from truetune.data.token_cache import Tokenised
from truetune.errors import DataError
from truetune.train.log import Screen

Encode = Callable[[Sequence[Row]], tuple[TokenSet, list[Reject]]]
Limit = Callable[[TokenSet], tuple[TokenSet, list[Reject]]]


@dataclass(frozen=True)
class Told:
    """A screen that keeps what it was told, so that it can be told again where the work is spared."""

    screen: Screen
    lines: list[tuple[str, str]] = field(default_factory=list)

    def note(self, text: str) -> None:
        """As ``Screen.note``."""
        self.lines.append(("note", text))
        self.screen.note(text)

    def warn(self, text: str) -> None:
        """As ``Screen.warn``."""
        self.lines.append(("warn", text))
        self.screen.warn(text)


@dataclass(frozen=True)
class Source:
    """Rows that were understood, those that were not, and how many there were."""

    rows: list[Row]
    rejects: list[Reject]
    read: int


def sources(config: TrainConfig, form: str, screen: Told) -> tuple[Source, Source]:
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
        return source, Source([], [], 0)
    train, held = split(source.rows, config.val_split)
    if not (train and held):
        raise DataError(
            f"--val-split {config.val_split:g}: of {len(source.rows)} rows, {len(train)} would be trained on and "
            f"{len(held)} held out",
            ("way out", "a larger share, more rows, or --val-data FILE"),
        )
    return Source(train, source.rejects, source.read), Source(held, [], 0)


def tokenise(config: TrainConfig, source: Source, held: Source, encode: Encode, limit: Limit) -> Tokenised:
    """Both parts encoded and limited.

    Raises:
        DataError: too many rows can't be used, or none is left.
    """
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
    return Tokenised(train, held_out, [*rejects, *held_rejects], report)


def _read(config: TrainConfig, paths: Sequence[str], form: str) -> Source:
    raw, unreadable = read_rows(paths)
    rows, misfits = parse_rows(raw, form) if raw else ([], [])
    rejects, read = [*unreadable, *misfits], len(raw) + len(unreadable)
    rejected.raise_if_too_many(rejects, read, max_bad_rows=config.max_bad_rows)
    return Source(rows, rejects, read)


def _say_duplicates(rows: Sequence[Row], screen: Told) -> None:
    if repeats := duplicates(rows):
        named = "; ".join(f"{row} repeats row {first.row}" for row, first in repeats[:3])
        more = f"; … {len(repeats) - 3} more" if len(repeats) > 3 else ""
        screen.warn(f"{len(repeats)} rows say what another row says already: {named}{more}")
