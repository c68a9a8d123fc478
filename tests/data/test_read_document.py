"""JSON documents read stretch by stretch: however short the stretches are, nothing changes."""

import io
import json
import tracemalloc

import pytest

from truetune.data import read_document
from truetune.data.read_document import document_rows
from truetune.data.schema import RawRow
from truetune.errors import DataError

STRETCHES = [1, 2, 7, 64, 1 << 20]
ROWS = [{"text": "grün 你好 🙂", "n": [1, 2.5e3, {"a": None}]}, {"text": "a\nb", "long": "x" * 300}, 12, "bare", {}]


def read(data: bytes, stretch: int) -> list[object]:
    """The rows' values, and of each reject its place, reason and sentence."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read_document, "STRETCH", stretch)
        return [
            found.value if isinstance(found, RawRow) else (found.origin.row, found.reason, found.detail, found.raw)
            for found in document_rows("rows.json", io.BytesIO(data))
        ]


@pytest.mark.parametrize("stretch", STRETCHES)
@pytest.mark.parametrize("indent", [None, 2])
def test_the_rows_are_those_of_the_array(stretch: int, indent: int | None) -> None:
    text = json.dumps(ROWS * 3, ensure_ascii=False, indent=indent)
    assert read(b"\xef\xbb\xbf \n" + text.encode() + b"\r\n", stretch) == ROWS * 3


@pytest.mark.parametrize("stretch", STRETCHES)
def test_a_row_with_a_fault_of_its_own_is_left_out_and_the_rest_is_read(stretch: int) -> None:
    data = b'[{"a": 1}, {"a": NaN, "b": [1, 2]}, {"a": 1, "a": 2}, {"a": "\\ud83d"}, {"a": 12345}]'
    first, constant, twice, half, last = read(data, stretch)
    assert (first, last) == ({"a": 1}, {"a": 12345})
    assert constant == (2, "bad_json", "not valid JSON: NaN is no JSON number", '{"a": NaN, "b": [1, 2]}')
    assert twice == (3, "bad_json", "not valid JSON: the key 'a' is there twice", '{"a": 1, "a": 2}')
    assert isinstance(half, tuple)
    assert half[:2] == (4, "bad_unicode")


@pytest.mark.parametrize("stretch", STRETCHES)
@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b'[{"a": 1},\n {"b": 2}\n {"c": 3}]', "expecting ',' delimiter at line 3, column 2"),
        (b'[{"a": 1},\n\n {"b": "x}]', "unterminated string at line 3, column 8"),
        (b'[{"a": 1}, {"a": 2}', "expecting ',' delimiter at line 1, column 20"),
        (b'[{"a": 1}] [', "extra data at line 1, column 12"),
        (b'[{"a": 1},]', "expecting value at line 1, column 11"),
        (b"[" * 100_000, "nested too deeply"),
        (b'[{"a": 1},\n{"b": "gr\xc3\xbcn \xff"}]', "invalid byte 0xFF at file offset 24, line 2"),
        (b"hello, world", "starts with 'hello, wor'"),
    ],
)
def test_a_fault_of_the_file_is_named_with_its_place(stretch: int, data: bytes, words: str) -> None:
    with pytest.raises(DataError) as caught:
        read(data, stretch)
    assert words in caught.value.message


@pytest.mark.parametrize("stretch", STRETCHES)
def test_one_object_is_one_row_and_nothing_is_none(stretch: int) -> None:
    assert read(b' {"a": [1, 2]}\n', stretch) == [{"a": [1, 2]}]
    assert read(b" \n ", stretch) == []
    assert read(b"[ ]", stretch) == []


def test_what_was_read_is_let_go() -> None:
    data = json.dumps([{"text": "x" * 90}] * 20_000).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read_document, "STRETCH", 1000)
        tracemalloc.start()
        count = sum(1 for _ in document_rows("rows.json", io.BytesIO(data)))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert count == 20_000
    assert peak < 100_000 < len(data)


def test_a_fault_is_told_without_reading_the_rest() -> None:
    class Counted(io.BytesIO):
        taken = 0

        def read(self, size: int | None = -1, /) -> bytes:
            found = super().read(size)
            self.taken += len(found)
            return found

    stream = Counted(b'[{"a": 1}, {"b" 2}, ' + b'{"a": 1}, ' * 10_000 + b"{}]")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read_document, "STRETCH", 1000)
        with pytest.raises(DataError, match="expecting ':' delimiter at line 1, column 17"):
            list(document_rows("rows.json", stream))
    assert stream.taken <= 2000
