"""JSON, strictly; JSON lines, without losing count of the rows.

The standard decoder lets three things pass that would end up in the training text: NaN and Infinity, a key that is
there twice (the last one wins), and half a surrogate pair (which no tokenizer can encode). All three are faults here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from truetune.data.rejects import excerpt
from truetune.data.schema import Origin, RawRow, Reject
from truetune.errors import DataError

BOM = b"\xef\xbb\xbf"
TOO_LONG = "a whole number has more digits than can be read"
_LINES_OF_OBJECTS = re.compile(rb"\s*\{[^\n]*\n\s*\{")


class RefusedError(ValueError):
    """Text that the json module would accept and we do not."""


def parse_lines(
    name: str, lines: Iterable[bytes], *, first: int = 1, offset: int = 0
) -> tuple[list[RawRow], list[Reject]]:
    """One row per line; ``lines`` end in ``b"\\n"`` only, so U+2028 and a lone CR stay inside their row.

    Row numbers are line numbers from 1: blank lines and faulty ones keep theirs.

    Args:
        first: the number of the first of ``lines``, where they are not the file's first.
        offset: where it begins in the file, in bytes.
    Raises:
        DataError: the lines are those of one JSON array.
    """
    rows: list[RawRow] = []
    rejects: list[Reject] = []
    for number, line in enumerate(lines, start=first):
        body = line.removeprefix(BOM) if number == 1 else line
        offset += len(line) - len(body)
        if body.strip():
            found = _parse_line(Origin(name, number), body, offset=offset)
            if isinstance(found, RawRow):
                rows.append(found)
            else:
                rejects.append(found)
                if number == 1 and found.reason == "bad_json" and body.lstrip().startswith(b"["):
                    raise _one_array(name)
        offset += len(body)
    if len(rows) == 1 and not rejects and _holds_rows(rows[0]):
        raise _one_array(name)
    return rows, rejects


def _holds_rows(row: RawRow) -> bool:
    return row.origin.row == 1 and isinstance(row.value, list) and any(isinstance(item, dict) for item in row.value)


def _one_array(name: str) -> DataError:
    return DataError(f"{name}: one JSON array, not JSON lines", ("or", "rename it to end in .json"))


def holds_lines(start: bytes) -> bool:
    """Whether what a ``.json`` file starts with is JSON lines under a wrong name."""
    return _LINES_OF_OBJECTS.match(start.removeprefix(BOM)) is not None


def not_utf8(data: bytes, position: int, *, offset: int = 0) -> str:
    """The sentence for an invalid byte: ``position`` in ``data``, which itself starts at ``offset`` of the file."""
    return f"not UTF-8: first invalid byte 0x{data[position]:02X} at file offset {offset + position}"


def _parse_line(origin: Origin, line: bytes, *, offset: int) -> RawRow | Reject:
    line = line.removesuffix(b"\n").removesuffix(b"\r")  # or a string cut short would be blamed on the line end
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        where = f"{not_utf8(line, error.start, offset=offset)}, byte {error.start} of the line (counted from 0)"
        detail = f"{where}; perhaps the file is Latin-1: iconv -f latin1 -t utf-8 would mend it"
        return Reject(origin, "not_utf8", detail, excerpt(line.decode(errors="backslashreplace").strip()))
    try:
        return checked(RawRow(origin, STRICT.decode(text)), text)
    except (ValueError, RecursionError) as error:
        macs = isinstance(error, json.JSONDecodeError) and text[: error.pos].endswith("\r")
        hint = "; a carriage return alone ends no line: tr '\\r' '\\n' < FILE > NEW would mend it" if macs else ""
        return Reject(origin, "bad_json", f"not valid JSON: {words(error)}{hint}", excerpt(text.strip()))


def checked(row: RawRow, source: str) -> RawRow | Reject:
    """The row, unless it holds half a character."""
    # A surrogate can only have come from an escape, so most rows need no second look.
    if "\\u" not in source:
        return row
    try:
        json.dumps(row.value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        detail = f"{half} is half of a surrogate pair, without its other half: no character, and no token"
        return Reject(row.origin, "bad_unicode", detail, excerpt(row.value))
    return row


def words(error: ValueError | RecursionError, *, place: str = "") -> str:
    """What is wrong with a text, and where: at ``place``, or at the column of a line."""
    if isinstance(error, json.JSONDecodeError):
        what = error.msg.rstrip(": ").removesuffix(" at").removesuffix(" starting")
        return f"{what[:1].lower()}{what[1:]} at {place or f'column {error.colno}'}"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return str(error) if isinstance(error, RefusedError) else TOO_LONG


def _refuse_constant(name: str) -> Any:
    raise RefusedError(f"{name} is no JSON number")


def _refuse_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        keys = [key for key, _ in pairs]
        raise RefusedError(f"the key '{next(k for k in keys if keys.count(k) > 1)}' is there twice")
    return made


STRICT = json.JSONDecoder(object_pairs_hook=_refuse_twins, parse_constant=_refuse_constant)
LENIENT = json.JSONDecoder(parse_int=str)  # which takes a whole number of any length
