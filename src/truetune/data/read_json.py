"""JSON lines and JSON arrays: strict, and without losing count of the rows.

The standard decoder lets three things pass that would end up in the training text: NaN and Infinity, a key that is
there twice (the last one wins), and half a surrogate pair (which no tokenizer can encode). All three are faults here.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from truetune.data.rejects import excerpt
from truetune.data.schema import Origin, RawRow, Reject
from truetune.errors import DataError

BOM = b"\xef\xbb\xbf"
_BLANKS = re.compile(r"[ \t\n\r]*")
_LINES_OF_OBJECTS = re.compile(rb"\s*\{[^\n]*\n\s*\{")


class _RefusedError(ValueError):
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
        DataError: the lines are those of one JSON array spread over several.
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
                if number == 1 and found.reason == "bad_json" and body.strip() == b"[":
                    raise DataError(f"{name}: one JSON array, not JSON lines", ("or", "rename it to end in .json"))
        offset += len(body)
    return rows, rejects


def holds_lines(start: bytes) -> bool:
    """Whether what a ``.json`` file starts with is JSON lines under a wrong name."""
    return _LINES_OF_OBJECTS.match(start.removeprefix(BOM)) is not None


def parse_document(name: str, data: bytes) -> tuple[list[RawRow], list[Reject]]:
    """A ``.json`` file: an array of rows (numbered by position from 1), one object, or JSON lines under a wrong name.

    Raises:
        DataError: the file as a whole is not UTF-8, not JSON, or neither an array nor an object.
    """
    body = data.removeprefix(BOM)
    if holds_lines(data):
        return parse_lines(name, io.BytesIO(data))
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        line = body.count(b"\n", 0, error.start) + 1
        found = not_utf8(body, error.start, offset=len(data) - len(body))
        raise DataError(f"{name}: {found}, line {line}") from error
    start = _skip(text, 0)
    if text[start : start + 1] not in ("[", "{", ""):
        raise DataError(
            f"{name}: starts with {text[start : start + 10]!r}",
            ("expected", "a JSON array of objects, or one object per line"),
        )
    try:
        return _split(_document_rows(name, text, start))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{name}: not valid JSON: {_words(error, with_line=True)}",
            ("or", "mend the file; written as JSON lines (.jsonl), a faulty row alone could be left out"),
        ) from error


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
        return _checked(RawRow(origin, _STRICT.decode(text)), text)
    except (ValueError, RecursionError) as error:
        return Reject(origin, "bad_json", f"not valid JSON: {_words(error)}", excerpt(text.strip()))


def _document_rows(name: str, text: str, start: int) -> Iterator[RawRow | Reject]:
    if text[start : start + 1] == "{":
        yield _checked(RawRow(Origin(name, 1), _STRICT.decode(text)), text)
    if text[start : start + 1] != "[":
        return
    at, number = _skip(text, start + 1), 0
    while number or text[at : at + 1] != "]":
        number += 1
        found, at = _array_item(Origin(name, number), text, at)
        yield found
        at = _skip(text, at)
        if text[at : at + 1] == "]":
            break
        if text[at : at + 1] != ",":
            raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
        at = _skip(text, at + 1)
    if (rest := _skip(text, at + 1)) != len(text):
        raise json.JSONDecodeError("Extra data", text, rest)


def _array_item(origin: Origin, text: str, at: int) -> tuple[RawRow | Reject, int]:
    try:
        value, end = _STRICT.raw_decode(text, at)
        return _checked(RawRow(origin, value), text[at:end]), end
    except _RefusedError as error:
        end = _LENIENT.raw_decode(text, at)[1]  # only to find where the next row starts
        return Reject(origin, "bad_json", f"not valid JSON: {error}", excerpt(text[at:end])), end


def _checked(row: RawRow, source: str) -> RawRow | Reject:
    """A surrogate can only have come from an escape, so most rows need no second look."""
    if "\\u" not in source:
        return row
    try:
        json.dumps(row.value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        detail = f"{half} is half of a surrogate pair, without its other half: no character, and no token"
        return Reject(row.origin, "bad_unicode", detail, excerpt(row.value))
    return row


def _split(found: Iterable[RawRow | Reject]) -> tuple[list[RawRow], list[Reject]]:
    rows: list[RawRow] = []
    rejects: list[Reject] = []
    for item in found:
        if isinstance(item, RawRow):
            rows.append(item)
        else:
            rejects.append(item)
    return rows, rejects


def _skip(text: str, at: int) -> int:
    match = _BLANKS.match(text, at)
    return match.end() if match else at


def _words(error: ValueError | RecursionError, *, with_line: bool = False) -> str:
    if isinstance(error, json.JSONDecodeError):
        what = error.msg.rstrip(": ").removesuffix(" at").removesuffix(" starting")
        line = f"line {error.lineno}, " if with_line else ""
        return f"{what[:1].lower()}{what[1:]} at {line}column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _refuse_constant(name: str) -> Any:
    raise _RefusedError(f"{name} is no JSON number")


def _refuse_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        keys = [key for key, _ in pairs]
        raise _RefusedError(f"the key '{next(k for k in keys if keys.count(k) > 1)}' is there twice")
    return made


_STRICT = json.JSONDecoder(object_pairs_hook=_refuse_twins, parse_constant=_refuse_constant)
_LENIENT = json.JSONDecoder()
