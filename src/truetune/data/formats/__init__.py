"""The formats in which people write training rows, and how a file's format is found.

A format is a module with ``NAME``, ``COLUMNS`` (for people), ``fits(columns)`` and ``parse(raw)``. A file has one
format: the first row whose fields fit one sets it, and a row of another form is rejected with the reason. A row whose
fields fit two is refused: what it means is not guessed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from truetune.data.formats import alpaca, chosen, messages, prompt_completion, sharegpt, text
from truetune.data.formats.checks import FIELDS, RowError, refuse_unsupervised
from truetune.data.formats.columns import Columns, check_columns, renamed
from truetune.data.rejects import excerpt
from truetune.data.schema import RawRow, Reject, Row
from truetune.errors import ConfigError, DataError, nearest

__all__ = ["FORMATS", "Choice", "Format", "detect", "parse_rows", "settle"]


class Format(Protocol):
    """What a format's module offers."""

    NAME: str
    COLUMNS: str

    def fits(self, columns: set[str]) -> bool:
        """Whether a row with these fields is meant to be of this format."""

    def parse(self, raw: RawRow) -> Row:
        """The row understood; raises ``RowError``."""


# A row of any of the others may carry its rendered `text` too; preference rows are taken only when asked for.
FORMATS: tuple[Format, ...] = (messages, sharegpt, alpaca, prompt_completion, text, chosen)
_DETECTED: tuple[Format, ...] = (messages, sharegpt, alpaca, prompt_completion, text)


@dataclass(frozen=True)
class Choice:
    """How the rows of one file are to be understood; found once, by its first rows."""

    form: Format
    why: str
    columns: Columns = field(default_factory=dict)


def detect(raw_rows: Sequence[RawRow]) -> str:
    """The name of the format of one file's rows, set by the first row that fits one.

    Raises:
        DataError: no row fits any format, or one fits two; says which fields were found and which are known.
    """
    return _detect(raw_rows)[0].NAME


def settle(rows: Sequence[RawRow], format: str, columns: Columns | None = None) -> Choice:  # noqa: A002 - the flag's name
    """How to understand a file, by its rows or the first block of them.

    Args:
        rows: of one file, at least one.
        format: a format's name, or ``auto`` to detect it.
        columns: which column holds which field, see ``formats.columns``.

    Raises:
        ConfigError: no format has this name.
        DataError: a column that is nowhere; rows that fit no format, or two (``auto`` only).
    """
    columns = columns or {}
    if columns:
        check_columns(rows, columns)
    if format != "auto":
        return Choice(_named(format), f"--format is {format}", columns)
    form, setter = _detect([_renamed_or_not(row, columns) for row in rows])
    return Choice(form, f"row {setter.origin.row} set the format of this file: {form.NAME}", columns)


def parse_rows(
    raw: Sequence[RawRow],
    format: str,  # noqa: A002 - the flag's name
    *,
    columns: Columns | None = None,
    choices: dict[str, Choice] | None = None,
) -> tuple[list[Row], list[Reject]]:
    """Understand rows of any number of files.

    Args:
        raw: the rows as read.
        format: a format's name, or ``auto`` to detect it for each file by itself.
        columns: which column holds which field, see ``formats.columns``.
        choices: what was settled for each file by an earlier block of its rows; what this block settles is added.
    Returns:
        Rows and rejects, each in the order of ``raw``; every raw row is in exactly one of the two.

    Raises:
        ConfigError, DataError: as ``settle``.
    """
    if format != "auto":
        _named(format)
    chosen_by_file = {} if choices is None else choices
    new: dict[str, list[RawRow]] = {}
    for row in raw:
        if row.origin.file not in chosen_by_file:
            new.setdefault(row.origin.file, []).append(row)
    chosen_by_file.update({file: settle(rows, format, columns) for file, rows in new.items()})
    used: list[Row] = []
    rejects: list[Reject] = []
    for row in raw:
        try:
            used.append(_understood(row, chosen_by_file[row.origin.file]))
        except RowError as error:
            rejects.append(Reject(row.origin, error.reason, error.detail, excerpt(row.value)))
    return used, rejects


def _understood(row: RawRow, choice: Choice) -> Row:
    row = renamed(row, choice.columns)
    if isinstance(row.value, dict):
        refuse_unsupervised(row.value, preferences=choice.form is not chosen)
        _refuse_other_format(row, choice)
    return choice.form.parse(row)


def _refuse_other_format(row: RawRow, choice: Choice) -> None:
    columns = set(row.value)
    if choice.form.fits(columns) or (choice.form is alpaca and "output" in columns):  # it lacks its instruction
        return
    other = next((each.NAME for each in _DETECTED if each.fits(columns)), "")
    if other:
        raise RowError("other_format", f"looks like {other}, but {choice.why}")


def _named(name: str) -> Format:
    known = {each.NAME: each for each in FORMATS}
    if name not in known:
        options = ["auto", *known]
        raise ConfigError(
            f"--format: no format is called '{name}'",
            ("did you mean", nearest(name, options)),
            ("known", ", ".join(options)),
        )
    return known[name]


def _renamed_or_not(row: RawRow, columns: Columns) -> RawRow:
    try:
        return renamed(row, columns)
    except RowError:  # which is reported when the row itself is read
        return row


def _detect(raw_rows: Sequence[RawRow]) -> tuple[Format, RawRow]:
    """The format and the row that set it."""
    refused = ""
    for row in raw_rows:
        if not isinstance(row.value, dict):
            continue
        try:
            refuse_unsupervised(row.value)
        except RowError as error:
            refused = refused or f"{row.origin}: {error.detail}"
            continue
        fitting = _fitting({str(key) for key, content in row.value.items() if content is not None})
        if len(fitting) > 1:
            raise _ambiguous(row, fitting)
        if fitting:
            return fitting[0], row
    raise _no_format(raw_rows, refused)


def _fitting(columns: set[str]) -> list[Format]:
    found = [each for each in _DETECTED if each.fits(columns)]
    return [each for each in found if each is not text] or found


def _ambiguous(row: RawRow, fitting: Sequence[Format]) -> DataError:
    names = [each.NAME for each in fitting]
    return DataError(
        f"{row.origin}: its columns fit {' and '.join(names)}: {', '.join(map(str, row.value))}",
        ("way out", " or ".join(f"--format {name}" for name in names)),
        ("or", "--columns FIELD=COLUMN names the columns that count"),
    )


def _no_format(raw_rows: Sequence[RawRow], refused: str) -> DataError:
    if not raw_rows:
        return DataError("no format can be told from no rows")
    known = "\n".join(f"{each.NAME}: {each.COLUMNS}" for each in _DETECTED)
    if refused:
        return DataError(refused, ("expected", known), ("or", "make rows of one of these formats from this file"))
    file = raw_rows[0].origin.file
    found = list(dict.fromkeys(str(key) for row in raw_rows if isinstance(row.value, dict) for key in row.value))
    if not found:
        return DataError(f"{file}: no row is an object with fields", ("expected", known))
    close = {column: nearest(column, FIELDS.difference(found)) for column in found if column not in FIELDS}
    hints = ", ".join(f"{name} for {column}" for column, name in close.items() if name)
    more = f" and {len(found) - 12} more" if len(found) > 12 else ""
    return DataError(
        f"{file}: its columns fit no known format: {', '.join(found[:12])}{more}",
        ("did you mean", hints),
        ("known", known),
        ("way out", "--columns FIELD=COLUMN …, as in --columns instruction=question output=answer"),
    )
