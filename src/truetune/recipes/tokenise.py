"""Raw rows into tokens: read, checked, split, rendered, limited, with a report whose numbers add up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from truetune.config.sft import InstructionGroup, TrainConfig
from truetune.data import rejects as rejected
from truetune.data.duplicates import Likeness, likeness, said
from truetune.data.intake import Intake
from truetune.data.language import holds_code, letters, shares
from truetune.data.length import truncation
from truetune.data.policy import Policies, drops
from truetune.data.read import read_rows
from truetune.data.rejects import Rejects
from truetune.data.schema import Reject, Row
from truetune.data.sources import mixed_parts, named_twice, passed_over
from truetune.data.split import split
from truetune.data.token_files import Tokenised
from truetune.data.token_set import TokenSet
from truetune.errors import DataError, counted
from truetune.train.log import Screen

Encode = Callable[[Sequence[Row]], tuple[TokenSet, list[Reject]]]
Limit = Callable[..., tuple[TokenSet, list[Reject]]]  # of a set, and whether its examples are all plain texts


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
    """Rows that were understood, those that were not, and how many there were.

    ``alike`` says what among them repeats what; ``letters`` and ``code_rows`` what they are written in; ``dropped``
    from how many of them each policy took something off.
    """

    rows: Sequence[Row]
    rejects: Rejects
    read: int
    alike: Likeness = field(default_factory=Likeness)
    letters: Counter[str] = field(default_factory=Counter)
    code_rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


def sources(config: TrainConfig, form: str, screen: Told) -> tuple[Source, Source]:
    """``(to train on, held out)``; rows held out by ``--val-split`` were read, and are counted, with the first."""
    source, held = _parted(config, form, screen)
    alike = likeness(source.rows, held.rows)
    for line in alike.warnings():
        screen.warn(line)
    texts = [said(row) for row in source.rows]
    code_rows, dropped = sum(map(holds_code, texts)), drops([*source.rows, *held.rows])
    return replace(source, alike=alike, letters=letters(texts), code_rows=code_rows, dropped=dropped), held


def _parted(config: TrainConfig, form: str, screen: Told) -> tuple[Source, Source]:
    source = _read(config, config.data, form)
    say_passed_over(config, screen)
    if config.val_data:
        return source, _read(config, config.val_data, form)
    if not config.val_split:
        return source, Source([], Rejects(), 0)
    train, held = split(source.rows, config.val_split)
    check_parts(config, len(train), len(held))
    return Source(train, source.rejects, source.read), Source(held, Rejects(), 0)


def say_passed_over(config: TrainConfig, screen: Told) -> None:
    """Name the files of a folder that are no data, those that are read twice, and what is dropped from rows."""
    if others := passed_over([*config.data, *config.val_data]):
        some = f"{len(others):,} files are not data and are" if len(others) > 1 else "1 file is not data and is"
        screen.warn(f"{some} not read: {', '.join(others[:5])}{', …' if len(others) > 5 else ''}")
    if twice := named_twice(config.data):
        some = f"{len(twice):,} files are named" if len(twice) > 1 else "1 file is named"
        shown = f"{', '.join(twice[:5])}{', …' if len(twice) > 5 else ''}"
        screen.warn(f"{some} more than once in --data, and read as often: {shown}; FILE=2 would ask for that")
    for line in mixed_parts(config.data):
        screen.warn(f"{line}; name the files that are meant, and those with held-out rows as --val-data")
    if dropped := [name.replace("_", " ") for name in policies(config).dropping()]:
        screen.note(f"dropped from the rows that bring them, as asked: {', '.join(dropped)}")


def check_parts(config: TrainConfig, train: int, held_out: int) -> None:
    """Refuse a ``--val-split`` that leaves one part without rows."""
    if not (train and held_out):
        raise DataError(
            f"--val-split {config.val_split:g}: of {counted(train + held_out, 'row')}, {train} would be trained on and "
            f"{held_out} held out",
            ("way out", "a larger share, more rows, or --val-data FILE"),
        )


def tokenise(config: TrainConfig, source: Source, held: Source, encode: Encode, limit: Limit) -> Tokenised:
    """Both parts encoded and limited.

    Raises:
        DataError: too many rows can't be used, or none is left.
    """
    texts = not any(row.messages for row in (*source.rows, *held.rows))
    parts = encode(source.rows), encode(held.rows) if held.rows else (None, [])
    return finish(config, source, held, *parts, limit, texts=texts)


def finish(
    config: TrainConfig,
    source: Source,
    held: Source,
    encoded: tuple[TokenSet, list[Reject]],
    held_encoded: tuple[TokenSet | None, list[Reject]],
    limit: Limit,
    *,
    texts: bool,
) -> Tokenised:
    """``tokenise`` from where both parts are encoded; ``texts`` says that there is no conversation among them."""
    (train, bad), (held_out, held_bad) = encoded, held_encoded
    both, apart = ([*bad, *held_bad], []) if config.val_split else (bad, held_bad)
    rejected.raise_if_too_many(source.rejects + both, source.read, max_bad_rows=config.max_bad_rows)
    rejected.raise_if_too_many(held.rejects + apart, held.read, max_bad_rows=config.max_bad_rows)
    whole, held_whole = train, held_out
    train, long = limit(whole, texts=texts)
    held_out, held_long = limit(held_whole, texts=texts) if held_whole else (None, [])
    rejects, held_rejects = source.rejects + bad + long, held.rejects + held_bad + held_long
    if not train.trained_count() or (held.rows and not held_out):
        emptied, why = (
            (config.val_data or config.data, held_rejects) if train.trained_count() else (config.data, rejects)
        )
        raise DataError(
            f"no row of {', '.join(emptied)} is left to {'hold out' if train.trained_count() else 'train on'}",
            ("left out", "\n".join(_reasons(why))),
            ("way out", _for_long_rows(texts) if "over_length" in why.counts() else ""),
        )
    report = {
        "read": source.read,
        "used": len(train) + (len(held_out) if held_out and config.val_split else 0),
        "rejected": (rejects + held_rejects if config.val_split else rejects).counts(),
        "dropped": {name: source.dropped[name] for name in policies(config).dropping()},
        "tokens": len(train.tokens),
        "trained_tokens": train.trained_count(),
        "truncated": truncation(whole, train),
        "max_length_seen": train.longest(),
        "held_out": None,
        "repeats": source.alike.facts(),
        "scripts": shares(source.letters),
        "code_rows": source.code_rows,
    }
    if held_out and held_whole:
        report["held_out"] = {"rows": len(held_out), "tokens": len(held_out.tokens),
                              "rejected": held_rejects.counts(),
                              "truncated": truncation(held_whole, held_out)}  # fmt: skip
    return Tokenised(train, held_out, rejects + held_rejects, report)


def _reasons(rejects: Rejects) -> list[str]:
    """Why the first of these rows were left out, and how many were by choice."""
    by_choice = [f"{counted(rows, 'row')} of {file}: {why}" for (file, _, why), rows in rejects.left_out.items()]
    return [*(f"{reject.origin}: {reject.detail}" for reject in rejects[:8]), *by_choice]


def _for_long_rows(texts: bool) -> str:
    """What keeps rows over the limit, whatever the model's own limit is."""
    blocks = "--text-blocks joins the texts and cuts them into blocks, with nothing lost; " if texts else ""
    return f"{blocks}--on-overlong truncate cuts rows that are too long"


def policies(config: TrainConfig) -> Policies:
    """What these settings drop or refuse; raw text brings nothing of the kind."""
    if not isinstance(config, InstructionGroup):
        return Policies()
    return Policies(config.thinking, config.tools, config.system_messages)


def intake(config: TrainConfig) -> Intake:
    """How these settings want rows to be understood; to be called as ``formats.parse_rows``."""
    paths = [*config.data, *config.val_data]
    return Intake.of(paths, columns=config.columns, policies=policies(config), seed=config.seed)


def _read(config: TrainConfig, paths: Sequence[str], form: str) -> Source:
    raw, unreadable = read_rows(paths)
    rows, misfits = intake(config)(raw, form) if raw else ([], [])
    rejects, read = Rejects([*unreadable, *misfits]), len(raw) + len(unreadable)
    rejected.raise_if_too_many(rejects, read, max_bad_rows=config.max_bad_rows)
    return Source(rows, rejects, read)
