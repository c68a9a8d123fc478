import bz2
import gzip
import json
import lzma
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from truetune.data.read import read_rows
from truetune.data.read_json import parse_lines
from truetune.data.schema import RawRow, Reject
from truetune.data.sources import passed_over
from truetune.errors import DataError


def read(path: Path, content: bytes) -> tuple[list[RawRow], list[Reject]]:
    path.write_bytes(content)
    return read_rows([str(path)])


def values(rows: list[RawRow]) -> list[object]:
    return [row.value for row in rows]


def numbers(rows: list[RawRow] | list[Reject]) -> list[int]:
    return [row.origin.row for row in rows]


@given(st.lists(st.text(), min_size=1), st.sampled_from([b"\n", b"\r\n"]), st.booleans())
def test_any_text_survives_json_lines(texts: list[str], newline: bytes, escaped: bool) -> None:
    lines = [json.dumps({"text": text}, ensure_ascii=escaped).encode() + newline for text in texts]
    rows, rejects = parse_lines("x.jsonl", lines)
    assert (values(rows), rejects) == ([{"text": text} for text in texts], [])


def test_only_a_newline_ends_a_json_line(tmp_path: Path) -> None:
    text = "a\u2028b\u2029c\x85d\x0be"
    content = json.dumps({"text": text}, ensure_ascii=False).encode()
    rows, rejects = read(tmp_path / "x.jsonl", content + b"\n" + content)
    assert (values(rows), rejects) == ([{"text": text}] * 2, [])


def test_blank_and_faulty_lines_keep_their_numbers(tmp_path: Path) -> None:
    rows, rejects = read(tmp_path / "x.jsonl", b'{"a": 1}\n\n  \r\n{"a": \n{"a": 5}\n')
    assert (numbers(rows), numbers(rejects)) == ([1, 5], [4])


@pytest.mark.parametrize(
    ("line", "reason", "words"),
    [
        (b'{"a": NaN}', "bad_json", "NaN is no JSON number"),
        (b'{"a": -Infinity}', "bad_json", "-Infinity"),
        (b'{"a": 1, "a": 2}', "bad_json", "the key 'a' is there twice"),
        (b'{"a": 1} x', "bad_json", "extra data at column 10"),
        (b'{"a": "b', "bad_json", "unterminated string at column 7"),
        (b"[" * 100_000, "bad_json", "nested too deeply"),
        (b'{"a": "\\ud83d"}', "bad_unicode", "half of a surrogate pair"),
        (b'{"a": "\xe9"}', "not_utf8", "0xE9 at file offset 15, byte 7 of the line"),
    ],
)
def test_a_faulty_line_is_one_reject(tmp_path: Path, line: bytes, reason: str, words: str) -> None:
    rows, rejects = read(tmp_path / "x.jsonl", b'{"a":0}\n' + line)
    assert (numbers(rows), numbers(rejects), rejects[0].reason) == ([1], [2], reason)
    assert words in rejects[0].detail


def test_escaped_surrogate_pairs_are_characters(tmp_path: Path) -> None:
    rows, _ = read(tmp_path / "x.jsonl", b'{"a": "\\ud83d\\ude00"}')
    assert values(rows) == [{"a": "\U0001f600"}]


def test_json_array_rows_are_numbered_by_position(tmp_path: Path) -> None:
    rows, rejects = read(tmp_path / "x.json", b'\xef\xbb\xbf [{"a": 1},\n\n {"a": NaN}, {"a": 3} ]\n')
    assert (numbers(rows), numbers(rejects)) == ([1, 3], [2])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'[{"a": 1},\n {"a" 2}]', "expecting ':' delimiter at line 2, column 7"),
        (b'[{"a": 1}\n', "expecting ',' delimiter at line 2, column 1"),
        (b'[{"a": 1}] x', "extra data at line 1, column 12"),
        (b'[{"a": 1},]', "at line 1, column"),
        (b'[\n{"a": "\xe9"}]', "0xE9 at file offset 9, line 2"),
        (b'\xef\xbb\xbf["\xe9"]', "0xE9 at file offset 5, line 1"),
        (b"hello", "starts with 'hello'"),
    ],
)
def test_a_broken_json_file_is_refused_with_the_place(tmp_path: Path, content: bytes, words: str) -> None:
    with pytest.raises(DataError, match=words):
        read(tmp_path / "x.json", content)


def test_json_lines_under_a_json_name_are_accepted(tmp_path: Path) -> None:
    rows, rejects = read(tmp_path / "x.json", b'{"a": \n{"a": 2}\n{"a": 3}\n')
    assert (numbers(rows), numbers(rejects)) == ([2, 3], [1])


def test_an_array_under_a_json_lines_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"end in \.json"):
        read(tmp_path / "x.jsonl", b'[\n{"a": 1}\n]')


@pytest.mark.parametrize("name", ["x.json.gz", "x.jsonl.gz"])
def test_gzip_is_read_through(tmp_path: Path, name: str) -> None:
    rows, _ = read(tmp_path / name, gzip.compress(b'{"a": 1}\n{"a": 2}\n', mtime=0))
    assert numbers(rows) == [1, 2]


@pytest.mark.parametrize("content", [b"no gzip at all", gzip.compress(b'{"a": 1}\n' * 9, mtime=0)[:-9]])
def test_damaged_gzip_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DataError, match="damaged"):
        read(tmp_path / "x.jsonl.gz", content)


def test_csv_keeps_strings_and_counts_records(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbfa,b\r\n1,"two\r\nlines"\r\n\r\n3,"say ""hi"""\r\n'
    rows, rejects = read(tmp_path / "x.csv", content)
    assert values(rows) == [{"a": "1", "b": "two\r\nlines"}, {"a": "3", "b": 'say "hi"'}]
    assert (numbers(rows), rejects) == ([1, 2], [])


def test_csv_faults_are_rejects_with_their_line(tmp_path: Path) -> None:
    rows, rejects = read(tmp_path / "x.csv", b'a,b\n1,2\n3\n4,5,6\n7,\xe9\n8,9\n10,"open\n11,12\n')
    assert numbers(rows) == [1, 5]
    assert [(r.origin.row, r.reason) for r in rejects] == [
        (2, "bad_csv"),
        (3, "bad_csv"),
        (4, "not_utf8"),
        (6, "bad_csv"),
    ]
    assert "from line 7 on: a quote is opened and never closed" in rejects[-1].detail


def test_tsv_is_parted_by_tabs(tmp_path: Path) -> None:
    rows, rejects = read(tmp_path / "x.tsv", b'a\tb\n1,5\t"x\ty"\n3\n')
    assert (values(rows), [reject.reason for reject in rejects]) == ([{"a": "1,5", "b": "x\ty"}], ["bad_csv"])


def test_a_header_parted_by_something_else_is_refused_with_the_suffix_that_is_meant(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"\.tsv") as caught:
        read(tmp_path / "x.csv", b"a\tb\n1\t2\n")
    assert "commas" in str(caught.value)
    with pytest.raises(DataError, match="tabs"):
        read(tmp_path / "x.tsv", b"a,b\n1,2\n")


def test_csv_fields_may_be_long(tmp_path: Path) -> None:
    rows, _ = read(tmp_path / "x.csv", b"a,b\n1," + b"x" * 300_000)
    assert rows[0].value["b"] == "x" * 300_000


@pytest.mark.parametrize(("header", "words"), [(b"a;b", "parted by commas"), (b"a,a", "a column twice: a")])
def test_an_impossible_csv_header_is_refused(tmp_path: Path, header: bytes, words: str) -> None:
    with pytest.raises(DataError, match=words):
        read(tmp_path / "x.csv", header + b"\n1,2\n")


def test_parquet_rows_are_numbered_by_position(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": ["a", None]}), path)
    rows, _ = read_rows([str(path)])
    assert (numbers(rows), values(rows)) == ([1, 2], [{"text": "a"}, {"text": None}])


def test_damaged_parquet_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        read(tmp_path / "x.parquet", b"PAR1 and then nothing")


def test_a_text_file_is_one_document_byte_for_byte(tmp_path: Path) -> None:
    rows, _ = read(tmp_path / "x.txt", " a\r\n\nb\u2028 ".encode())
    assert values(rows) == [{"text": " a\r\n\nb\u2028 "}]


def test_text_that_is_not_utf8_is_a_reject(tmp_path: Path) -> None:
    rows, rejects = read(tmp_path / "x.txt", b"caf\xe9")
    assert (rows, rejects[0].reason) == ([], "not_utf8")
    assert "0xE9 at file offset 3" in rejects[0].detail


def test_utf16_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="UTF-16"):
        read(tmp_path / "x.jsonl", '{"a": 1}'.encode("utf-16"))


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet", "txt"])
def test_an_empty_file_is_refused(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(DataError, match="no rows: the file is empty"):
        read(tmp_path / f"x.{suffix}", b"")


@pytest.mark.parametrize(
    ("name", "content"), [("x.json", b"[]"), ("x.csv", b"a,b\n"), ("x.jsonl", b"\n"), ("x.txt", b" ")]
)
def test_a_file_without_rows_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    with pytest.raises(DataError, match="no rows"):
        read(tmp_path / name, content)


def test_a_folder_gives_its_data_files_in_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", ".hidden.jsonl", "README.md"):
        (tmp_path / name).write_text('{"a": 1}\n')
    (tmp_path / "below").mkdir()
    rows, _ = read_rows([str(tmp_path)])
    assert [row.origin.file for row in rows] == [os.path.join(tmp_path, n) for n in ("a.jsonl", "b.jsonl")]


def test_a_glob_gives_its_files_in_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.txt"):
        (tmp_path / name).write_text('{"a": 1}\n')
    rows, _ = read_rows([str(tmp_path / "*.jsonl")])
    assert [Path(row.origin.file).name for row in rows] == ["a.jsonl", "b.jsonl"]


def test_a_name_with_brackets_is_a_file_before_it_is_a_glob(tmp_path: Path) -> None:
    rows, _ = read(tmp_path / "x[1].jsonl", b'{"a": 1}\n')
    assert numbers(rows) == [1]


def test_an_empty_folder_is_refused_and_its_sub_folders_named(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match=r"no data file in this folder[\s\S]*sub-folders train"):
        read_rows([str(tmp_path)])


def test_a_glob_without_a_match_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data file matches"):
        read_rows([str(tmp_path / "*.jsonl")])


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "quotes.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"qoutes\.jsonl: no such file[\s\S]*did you mean\s+\S*/quotes\.jsonl"):
        read_rows([str(tmp_path / "qoutes.jsonl")])


def test_a_missing_folder_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "training").mkdir()
    with pytest.raises(DataError, match=r"did you mean\s+\S*/training"):
        read_rows([str(tmp_path / "trainin" / "x.jsonl")])


def test_an_unknown_suffix_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a '\.jsonll' file[\s\S]*did you mean\s+\.jsonl[\s\S]*\.parquet"):
        read(tmp_path / "x.jsonll", b"{}")


def test_a_link_to_nowhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").symlink_to(tmp_path / "gone.jsonl")
    with pytest.raises(DataError, match="can't be read: No such file"):
        read_rows([str(tmp_path / "x.jsonl")])


def test_no_path_at_all_is_refused() -> None:
    with pytest.raises(DataError, match="no file was named"):
        read_rows([])


def test_what_a_folder_holds_beside_data_is_known(tmp_path: Path) -> None:
    for name in ("a.jsonl", "notes.docx", ".hidden"):
        (tmp_path / name).write_text("{}\n", encoding="utf-8")
    assert passed_over([str(tmp_path)]) == [str(tmp_path / "notes.docx")]


@pytest.mark.parametrize("content", [b'[{"a": 1}, {"a": 2}]', b'[{"a": 1},\n{"a": 2}]\n', b'\xef\xbb\xbf[{"a": 1}]\n'])
def test_an_array_in_json_lines_is_told_from_rows_that_are_arrays(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DataError, match=r"one JSON array[\s\S]*rename it to end in \.json"):
        read(tmp_path / "x.jsonl", content)
    rows, rejects = read(tmp_path / "y.jsonl", b'["a"]\n[{"a": 1}]\n')
    assert (values(rows), rejects) == ([["a"], [{"a": 1}]], [])


@pytest.mark.parametrize(
    ("content", "way_out"),
    [
        (gzip.compress(b'{"a": 1}\n'), r"rename it to end in \.jsonl\.gz"),
        (bz2.compress(b'{"a": 1}\n'), r"rename it to end in \.jsonl\.bz2"),
        (lzma.compress(b'{"a": 1}\n'), r"rename it to end in \.jsonl\.xz"),
        (b"(\xb5/\xfd....", r"rename it to end in \.jsonl\.zst"),
        (b"PK\x03\x04....", "unzip "),
        (b"PAR1\x15....", r"rename it to end in \.parquet"),
    ],
    ids=["gzip", "bzip2", "xz", "zstandard", "zip", "parquet"],  # and not their bytes: gzip writes down the second
)
def test_a_file_of_another_kind_is_known_by_its_first_bytes(tmp_path: Path, content: bytes, way_out: str) -> None:
    with pytest.raises(DataError, match=way_out):
        read(tmp_path / "x.jsonl", content)


def test_a_number_without_end_is_the_fault_of_its_row(tmp_path: Path) -> None:
    long = b'{"a": ' + b"9" * 5000 + b"}"
    for name, content in (("x.jsonl", long + b'\n{"a": 1}\n'), ("x.json", b"[" + long + b', {"a": 1}]')):
        rows, (reject,) = read(tmp_path / name, content)
        assert values(rows) == [{"a": 1}]
        assert (reject.origin.row, reject.reason) == (1, "bad_json")
        assert reject.detail == "not valid JSON: a whole number has more digits than can be read"


def test_an_unclosed_quote_says_how_many_lines_it_takes(tmp_path: Path) -> None:
    _, (reject,) = read(tmp_path / "x.csv", b'a,b\n1,2\n"3,4\n5,6\n7,8\n')
    assert "from line 3 on" in reject.detail
    assert "up to line 5" in reject.detail


def test_carriage_returns_alone_are_named(tmp_path: Path) -> None:
    _, (reject,) = read(tmp_path / "x.jsonl", b'{"a": 1}\r{"a": 2}\r')
    assert "a carriage return alone ends no line" in reject.detail
    _, (reject,) = read(tmp_path / "y.jsonl", b'{"a": 1} {"a": 2}\r\n')
    assert "carriage return" not in reject.detail


def test_a_table_row_that_is_not_utf8_is_one_reject(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="reading tables needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="reading Parquet needs pyarrow")
    offsets, text = (
        pyarrow.py_buffer(b"".join(n.to_bytes(4, "little") for n in (0, 1, 2, 3))),
        pyarrow.py_buffer(b"a\xffc"),
    )
    column = pyarrow.Array.from_buffers(pyarrow.string(), 3, [None, offsets, text])
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "x.parquet")
    rows, rejects = read_rows([str(tmp_path / "x.parquet")])
    assert values(rows) == [{"text": "a"}, {"text": "c"}]
    assert [(r.origin.row, r.reason, r.detail) for r in rejects] == [
        (2, "not_utf8", "not UTF-8: byte 0xFF in a text of this row")
    ]
