"""The formats in which people write training rows, and how a file's format is found.

A format is a module with ``NAME``, ``COLUMNS`` (for people), ``fits(columns)`` and ``parse(raw)``. A file has one
format: the first row whose fields fit one sets it, and a row of another form is rejected with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from truetune.data.formats import alpaca, messages, prompt_completion, sharegpt, text
from truetune.data.formats.checks import FIELDS, RowError, refuse_unsupervised
from truetune.data.rejects import excerpt
from truetune.data.schema import RawRow, Reject, Row
from truetune.errors import ConfigError, DataError, nearest

__all__ = ["FORMATS", "Format", "detect", "parse_rows"]


class Format(Protocol):
    """What a format's module offers."""

    NAME: str
    COLUMNS: str

    def fits(self, columns: set[str]) -> bool:
        """Whether a row with these fields is meant to be of this format."""

    def parse(self, raw: RawRow) -> Row:
        """The row understood; raises ``RowError``."""


# In this order: the more a format asks for, the earlier it is tried (an alpaca row may carry a rendered `text` too).
FORMATS: tuple[Format, ...] = (messages, sharegpt, alpaca, prompt_completion, text)


def detect(raw_rows: Sequence[RawRow]) -> str:
    """The name of the format of one file's rows, set by the first row that fits one.

    Raises:
        DataError: no row fits any format; says which fields were found and which are known.
    """
    return _detect(raw_rows)[0].NAME


def parse_rows(raw: Sequence[RawRow], format: str) -> tuple[list[Row], list[Reject]]:  # noqa: A002 - the flag's name
    """Understand rows of any number of files.

    Args:
        raw: the rows as read.
        format: a format's name, or ``auto`` to detect it for each file by itself.
    Returns:
        Rows and rejects, each in the order of ``raw``; every raw row is in exactly one of the two.

    Raises:
        ConfigError: no format has this name.
        DataError: a file whose rows fit no format (``auto`` only).
    """
    by_file: dict[str, list[RawRow]] = {}
    for row in raw:
        by_file.setdefault(row.origin.file, []).append(row)
    known = {each.NAME: each for each in FORMATS}
    if format != "auto" and format not in known:
        options = ["auto", *known]
        raise ConfigError(
            f"--format: no format is called '{format}'",
            ("did you mean", nearest(format, options)),
            ("known", ", ".join(options)),
        )
    chosen: dict[str, tuple[Format, str]] = {}
    for file, rows in by_file.items():
        if format == "auto":
            found, setter = _detect(rows)
            chosen[file] = found, f"row {setter.origin.row} set the format of this file: {found.NAME}"
        else:
            chosen[file] = known[format], f"--format is {format}"
    return _sort_out(raw, chosen)


def _sort_out(raw: Sequence[RawRow], chosen: dict[str, tuple[Format, str]]) -> tuple[list[Row], list[Reject]]:
    used: list[Row] = []
    rejects: list[Reject] = []
    for row in raw:
        form, why = chosen[row.origin.file]
        try:
            if isinstance(row.value, dict):
                refuse_unsupervised(row.value)
                _refuse_other_format(row, form, why=why)
            used.append(form.parse(row))
        except RowError as error:
            rejects.append(Reject(row.origin, error.reason, error.detail, excerpt(row.value)))
    return used, rejects


def _refuse_other_format(row: RawRow, form: Format, *, why: str) -> None:
    columns = set(row.value)
    if form.fits(columns):
        return
    other = next((each.NAME for each in FORMATS if each.fits(columns)), "")
    if other:
        raise RowError("other_format", f"looks like {other}, but {why}")


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
        for each in FORMATS:
            if each.fits(set(row.value)):
                return each, row
    raise _no_format(raw_rows, refused)


def _no_format(raw_rows: Sequence[RawRow], refused: str) -> DataError:
    if not raw_rows:
        return DataError("no format can be told from no rows")
    known = "\n".join(f"{each.NAME}: {each.COLUMNS}" for each in FORMATS)
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
        ("or", "rename the columns"),
    )
