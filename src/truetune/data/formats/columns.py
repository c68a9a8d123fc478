"""``--columns FIELD=COLUMN``: which column of a file holds a field that a format asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from truetune.data.formats.checks import FIELDS, RowError
from truetune.data.schema import RawRow
from truetune.errors import ConfigError, DataError, nearest

Columns = Mapping[str, str]  # field → column


def parse_columns(settings: Sequence[str]) -> Columns:
    """``["output=answer", "instruction=question"]`` as a mapping; several may stand in one text, parted by commas.

    Raises:
        ConfigError: no `=`, a field that no format knows, or one that is named twice.
    """
    found: dict[str, str] = {}
    for setting in (part for text in settings for part in text.split(",") if part.strip()):
        field, equals, column = (piece.strip() for piece in setting.partition("="))
        if not equals or not column:
            raise ConfigError(f"--columns: '{setting}'", ("expected", "FIELD=COLUMN, as in output=answer"))
        if field not in FIELDS:
            raise ConfigError(
                f"--columns: no format has a field '{field}'",
                ("did you mean", f"{close}={column}" if (close := nearest(field, FIELDS)) else ""),
                ("known", ", ".join(sorted(FIELDS))),
            )
        if found.setdefault(field, column) != column:
            raise ConfigError(f"--columns: the field '{field}' is given twice: {found[field]}, {column}")
    return found


def check_columns(rows: Sequence[RawRow], columns: Columns) -> None:
    """Whether each of ``columns`` is there in at least one of a file's rows.

    Raises:
        DataError: names the nearest column that is there.
    """
    there = dict.fromkeys(str(key) for row in rows if isinstance(row.value, dict) for key in row.value)
    for field, column in columns.items():
        if column not in there:
            raise DataError(
                f"{rows[0].origin.file}: no column '{column}' (--columns {field}={column})",
                ("did you mean", f"{field}={close}" if (close := nearest(column, there)) else ""),
                ("it has", ", ".join(list(there)[:20]) or "no columns at all"),
            )


def renamed(row: RawRow, columns: Columns) -> RawRow:
    """The row with each column under its field's name; one that lacks it is left for its format to complain about.

    Raises:
        RowError: ``column_taken``: the field is there under its own name too.
    """
    if not columns or not isinstance(row.value, dict):
        return row
    moved = {column for column in columns.values() if column in row.value}
    value = {key: content for key, content in row.value.items() if key not in moved}
    for field, column in columns.items():
        if column not in row.value:
            continue
        if value.get(field) is not None:
            detail = f"`{field}` is there already, beside `{column}` (--columns {field}={column})"
            raise RowError("column_taken", detail)
        value[field] = row.value[column]
    return replace(row, value=value)
