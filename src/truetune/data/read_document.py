"""A ``.json`` file that is one array or one object, read a stretch at a time: an array may be larger than memory.

Rows are numbered by their position from 1. Strictness is that of ``read_json``: a row with a fault of its own is left
out and named, a fault in the array itself ends the reading.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from truetune.data.read_json import LENIENT, STRICT, TOO_LONG, RefusedError, checked, not_utf8, words
from truetune.data.rejects import excerpt
from truetune.data.schema import Origin, RawRow, Reject
from truetune.errors import DataError

STRETCH = 1 << 20  # bytes that are read at once, about; an item that is longer doubles them
_LONGEST_WORD = 16  # characters, and more than any that JSON spells out: -Infinity, or an escaped pair
_BLANKS = re.compile(r"[ \t\n\r]*")


def document_rows(name: str, stream: BinaryIO) -> Iterator[RawRow | Reject]:
    """The rows of an array, or the one object that the file is.

    Raises:
        DataError: the file as a whole is not UTF-8, not JSON, or neither an array nor an object.
    """
    window = _Window(name, stream)
    opening = window.character()
    if opening not in ("[", "{", ""):
        raise DataError(
            f"{name}: starts with {window.ahead(10)!r}",
            ("expected", "a JSON array of objects, or one object per line"),
        )
    try:
        if opening == "{":
            yield _row(Origin(name, 1), window)
        elif opening == "[":
            yield from _items(name, window)
        if opening and window.character():
            raise json.JSONDecodeError("Extra data", window.text, window.at)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{name}: not valid JSON: {window.words(error)}",
            ("or", "mend the file; written as JSON lines (.jsonl), a faulty row alone could be left out"),
        ) from error


def _items(name: str, window: _Window) -> Iterator[RawRow | Reject]:
    window.at += 1
    number = 0
    while number or window.character() != "]":
        number += 1
        yield _item(Origin(name, number), window)
        following = window.character()
        if following not in ("]", ","):
            raise json.JSONDecodeError("Expecting ',' delimiter", window.text, window.at)
        if following == "]":
            break
        window.at += 1
        window.character()
    window.at += 1


def _item(origin: Origin, window: _Window) -> RawRow | Reject:
    try:
        return _row(origin, window)
    except RefusedError as error:
        _, source = window.value(LENIENT)  # only to find where the next row starts
        return Reject(origin, "bad_json", f"not valid JSON: {error}", excerpt(source))


def _row(origin: Origin, window: _Window) -> RawRow | Reject:
    value, source = window.value(STRICT)
    return checked(RawRow(origin, value), source)


class _Window:
    """The stretch of a text that is looked at: it grows at its end, and what was read is let go.

    Attributes:
        text: the stretch.
        at: how much of it has been read.
    """

    def __init__(self, name: str, stream: BinaryIO) -> None:
        self.text, self.at = "", 0
        self._name, self._stream = name, stream
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._bytes = self._lines = self._column = 0  # taken from the stream; let go, and of the last line of those
        self._ended = False

    def character(self) -> str:
        """The next one that is no blank; ``""`` at the end of the text."""
        while True:
            match = _BLANKS.match(self.text, self.at)
            self.at = match.end() if match else self.at
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]

    def ahead(self, count: int) -> str:
        """The next characters, fewer at the end of the text."""
        while len(self.text) - self.at < count and self.more():
            pass
        return self.text[self.at : self.at + count]

    def value(self, decoder: json.JSONDecoder) -> tuple[Any, str]:
        """The next value, and the text that it stands in.

        Raises:
            ValueError, RecursionError: by ``decoder``, once more text would not mend it.
        """
        self.character()
        while True:
            try:
                value, end = decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                if not self._may_be_cut(error) or not self.more():
                    raise
                continue
            except RefusedError:
                raise
            except ValueError as error:
                raise RefusedError(TOO_LONG) from error
            if end < len(self.text) or not self.more():  # a number may go on
                source, self.at = self.text[self.at : end], end
                return value, source

    def _may_be_cut(self, error: json.JSONDecodeError) -> bool:
        """Whether more text may mend it; else the rest of a large file would be read for nothing."""
        return error.msg.startswith("Unterminated string") or len(self.text) - error.pos < _LONGEST_WORD

    def more(self) -> bool:
        """Read on; False where the text has ended."""
        if self._ended:
            return False
        chunk = self._stream.read(max(STRETCH, len(self.text) - self.at))
        try:
            piece = self._decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise self._not_utf8(error, len(chunk)) from error
        self._ended = not chunk
        if not self._ended:  # at the end, whoever found a fault tells its place by the text as it is
            self._let_go()
        self.text += piece
        self._bytes += len(chunk)
        return not self._ended

    def words(self, error: ValueError | RecursionError) -> str:
        """What is wrong, with its line and column in the file."""
        if not isinstance(error, json.JSONDecodeError):
            return words(error)
        column = error.colno + (self._column if error.lineno == 1 else 0)
        return words(error, place=f"line {self._lines + error.lineno}, column {column}")

    def _let_go(self) -> None:
        gone, self.text, self.at = self.text[: self.at], self.text[self.at :], 0
        self._lines += gone.count("\n")
        self._column = len(gone) - gone.rfind("\n") - 1 + (0 if "\n" in gone else self._column)

    def _not_utf8(self, error: UnicodeDecodeError, new: int) -> DataError:
        start = self._bytes + new - len(error.object)  # in the file: the decoder holds a few earlier bytes
        line = self._lines + self.text.count("\n") + error.object.count(b"\n", 0, error.start) + 1
        return DataError(
            f"{self._name}: {not_utf8(error.object, error.start, offset=start)}, line {line}",
            ("or", "if the file is Latin-1: iconv -f latin1 -t utf-8 FILE > NEW"),
        )
