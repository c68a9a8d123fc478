"""What may stand behind ``--data``: packed files, tables, standard input, the Hub's cache, a registry, shares."""

import gzip
import hashlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from truetune.config.sft import SFTConfig
from truetune.data import standard_input
from truetune.data.compressed import UNPACKERS
from truetune.data.intake import Intake
from truetune.data.mix import take
from truetune.data.read import read_rows
from truetune.data.schema import Origin, Row
from truetune.data.sources import find_files, find_sources, mixed_parts, named_twice, passed_over
from truetune.data.token_cache import key_of
from truetune.errors import ConfigError, DataError

ROWS = [{"text": f"row {number} é"} for number in range(5)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def values(*paths: str) -> list[Any]:
    rows, rejects = read_rows(paths)
    assert rejects == []
    return [row.value for row in rows]


def write(path: Path, content: bytes = LINES) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return str(path)


def test_files_to_test_on_among_those_to_train_on_are_named(tmp_path: Path) -> None:
    for name in ("train-00.jsonl", "my_test.jsonl", "latest.jsonl"):
        write(tmp_path / name)
    (line,) = mixed_parts([str(tmp_path)])
    assert "my_test.jsonl" in line
    assert "latest.jsonl" not in line
    assert mixed_parts([str(tmp_path / "train*.jsonl"), str(tmp_path / "my_test.jsonl")]) == []


@pytest.mark.parametrize("packing", ["gz", "bz2", "xz", "zst"])
def test_a_packed_file_is_what_is_inside(packing: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.jsonl.{packing}"
    if packing == "zst":
        pyarrow = pytest.importorskip("pyarrow")
        with pyarrow.output_stream(str(path), compression="zstd") as stream:
            stream.write(LINES)
    else:
        import bz2
        import lzma

        path.write_bytes({"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}[packing](LINES))
    assert values(str(path)) == ROWS


@pytest.mark.parametrize("packing", ["gz", "bz2", "xz", "zst"])
def test_a_damaged_packed_file_is_named(packing: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"rows.jsonl.{packing}: (damaged|can't be read)"):
        read_rows([write(tmp_path / f"rows.jsonl.{packing}")])


@pytest.mark.parametrize("kind", ["feather", "arrow"])
def test_tables_of_arrow(kind: str, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.feather")
    pytest.importorskip("pyarrow.ipc")
    table, path = pyarrow.Table.from_pylist(ROWS), str(tmp_path / f"rows.{kind}")
    if kind == "feather":
        pyarrow.feather.write_feather(table, path)
    else:
        with pyarrow.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    assert values(path) == ROWS
    with pytest.raises(DataError, match=r"not a readable \w+ file"):
        read_rows([write(tmp_path / f"bad.{kind}", b"ARROW1 and no more than that")])


@pytest.mark.parametrize("suffix", UNPACKERS)
def test_an_archive_is_refused_with_the_command_that_unpacks_it(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="an archive") as caught:
        find_files([write(tmp_path / f"rows{suffix}")])
    assert f"{UNPACKERS[suffix]} " in str(caught.value)


# ---- standard input


def piped(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    standard_input.spooled.cache_clear()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


@pytest.mark.parametrize("content", [LINES, b"\n" + json.dumps(ROWS).encode()])
def test_standard_input_may_be_read_twice(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    piped(monkeypatch, content)
    assert (values("-"), values("-")) == (ROWS, ROWS)


def test_rows_of_standard_input_are_named_by_it_and_kept_by_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = []
    for content in (LINES + b"no", LINES + b"no", LINES):
        piped(monkeypatch, content)
        rows, rejects = read_rows(["-"])
        assert {str(row.origin) for row in rows} == {f"stdin, row {number}" for number in range(1, 6)}
        assert [str(reject.origin) for reject in rejects] == ["stdin, row 6"] * (content != LINES)
        keys.append(key_of({}, find_files(["-"])))
    assert None not in keys
    assert keys[0] == keys[1] != keys[2]


def test_without_standard_input_its_name_is_that_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    standard_input.spooled.cache_clear()
    with pytest.raises(DataError, match="stdin: no such file or folder"):
        find_files(["stdin"])


@pytest.mark.parametrize(("content", "words"), [(b" \n", "is empty"), (b"Once.", "begins with 'Once.'")])
def test_standard_input_that_is_no_data(content: bytes, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    piped(monkeypatch, content)
    with pytest.raises(DataError, match=f"standard input {words}"):
        find_files(["-"])


# ---- the Hub: its cache is laid out here as its client lays it out; no test has a network


def hub_cache(folder: Path, monkeypatch: pytest.MonkeyPatch, *files: str) -> None:
    from huggingface_hub import constants

    root = folder / "datasets--org--set"
    for file in files:
        write(root / "snapshots" / "abc" / file)
    write(root / "refs" / "main", b"abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))


def test_a_data_set_of_the_hub_is_found_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_cache(tmp_path / "1", monkeypatch, "data/train.jsonl", "data/test.jsonl", "README.md")
    with pytest.raises(DataError, match=r"several splits[\s\S]*hub:org/set:test or hub:org/set:train"):
        find_files(["hub:org/set"])
    assert values("hub:org/set:train") == ROWS
    with pytest.raises(DataError, match=r"no split 'trian'[\s\S]*did you mean\s+train"):
        find_files(["hub:org/set:trian"])


def test_a_data_set_that_was_never_fetched_says_so() -> None:
    with pytest.raises(DataError, match="hub:org/nowhere: the data set can't be fetched") as caught:
        find_files(["hub:org/nowhere"])
    assert "HF_HUB_OFFLINE is set" in str(caught.value)


def test_a_name_without_a_file_points_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="or --data hub:org/set for a data set of the Hub"):
        find_files(["org/set"])
    with pytest.raises(DataError, match="no name of a data set"):
        find_files(["hub:set"])


# ---- the registry


def registry(folder: Path, text: str) -> str:
    write(folder / "rows.jsonl")
    return write(folder / "data.yaml", text.encode())


def test_a_registry_names_files_and_how_they_are_read(tmp_path: Path) -> None:
    digest = hashlib.sha256(LINES).hexdigest()
    name = registry(
        tmp_path, f"mine: {{files: rows.jsonl, format: text, columns: {{text: body}}, weight: 0.5, sha256: {digest}}}"
    )
    (source,) = find_sources([f"{name}:mine"])
    assert (source.files, source.form, source.columns, source.weight) == (
        (str(tmp_path / "rows.jsonl"),), "text", {"text": "body"}, 0.5)  # fmt: skip
    assert find_sources([f"{name}:mine=0.5"])[0].weight == 0.25


def test_a_registry_in_this_folder_needs_no_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry(tmp_path, "mine: rows.jsonl")
    monkeypatch.chdir(tmp_path)
    assert values("mine") == ROWS


def test_a_name_that_is_a_folder_too_is_not_guessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry(tmp_path, "mine: rows.jsonl")
    write(tmp_path / "mine" / "others.jsonl", b'{"text": "another"}\n')
    write(tmp_path / "theirs" / "rows.jsonl")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"has a data set of this name(.|\n)*--data data\.yaml:mine(.|\n)*\./mine"):
        values("mine")
    assert values("data.yaml:mine") == values("theirs") == ROWS
    assert values("./mine") == [{"text": "another"}]


def test_standard_input_is_no_name_of_the_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry(tmp_path, "mine: rows.jsonl")
    monkeypatch.chdir(tmp_path)
    standard_input.spooled.cache_clear()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(LINES)))
    try:
        assert values("-") == ROWS
    finally:
        standard_input.spooled.cache_clear()


def test_bare_names_are_those_of_the_registry_that_is_given() -> None:
    config = SFTConfig(model="m", data=["mine=0.5", "rows.jsonl", "a/b", "-"], val_data="held", registry="r.yaml")
    assert config.data == ("r.yaml:mine=0.5", "rows.jsonl", "a/b", "-")
    assert config.val_data == ("r.yaml:held",)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mein: rows.jsonl", r"no data set is called 'mine'[\s\S]*did you mean\s+mein"),
        ("mine: {file: rows.jsonl}", r"unknown key 'file'[\s\S]*did you mean\s+files"),
        ("mine: {}", "`files` is missing"),
        ("mine: {files: [1]}", "`files` is missing, or no path"),
        ("mine: {files: rows.jsonl, columns: [a]}", "`columns` is no mapping"),
        ("mine: {files: rows.jsonl, weight: lots}", "`weight` is 'lots'"),
        ("mine: {files: rows.jsonl, weight: 1.5}", "can't be seen 1.5 times"),
        ("mine: {files: rows.jsonl, sha256: abc}", r"not those that the registry describes[\s\S]*expected\s+abc"),
        ("mine: {files: rows.jsonl, sha256: 00}", r"`sha256` is 0\n[\s\S]*in quotes[\s\S]*figures alone for a number"),
        ("mine: {files: rows.jsonl, sha256: }", "`sha256` is empty"),
        ("mine: rows.jsonl\nmine: rows.jsonl", "the key 'mine' is there twice"),
        ("mine: {files: rows.jsonl, files: other.jsonl}", "the key 'files' is there twice"),
        ("mine: {files: nothing.jsonl}", "no such file"),
        ("- mine", "no mapping from names"),
        ("mine: [", "not a readable YAML file"),
        ("", "no data set is called"),
    ],
)
def test_a_faulty_registry_says_why(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=words):
        find_sources([f"{registry(tmp_path, text)}:mine"])


# ---- shares


@pytest.mark.parametrize("weight", ["0", "1.5", "0.0"])
def test_a_weight_that_can_t_be(weight: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a share of them above 0 and up to 1, or a whole number"):
        find_files([f"{write(tmp_path / 'rows.jsonl')}={weight}"])


def test_a_file_may_be_called_like_a_weight(tmp_path: Path) -> None:
    name = write(tmp_path / "rows.jsonl=2.jsonl")
    assert find_sources([name])[0].files == (name,)
    assert passed_over([f"{tmp_path}=1"]) == []


def test_a_whole_weight_reads_the_file_as_often(tmp_path: Path) -> None:
    assert values(f"{write(tmp_path / 'rows.jsonl')}=2") == ROWS * 2


def test_one_file_has_one_share(tmp_path: Path) -> None:
    name = write(tmp_path / "rows.jsonl")
    with pytest.raises(
        ConfigError, match=r"is to be taken 0\.5 and 1 times\n  way out +name it once, with =WEIGHT: .*=0\.5"
    ):
        Intake.of([f"{name}=0.5", name])


def test_rows_left_out_by_choice_are_counted_and_no_fault(tmp_path: Path) -> None:
    name = write(tmp_path / "rows.jsonl", "".join(json.dumps({"text": f"row {n}"}) + "\n" for n in range(400)).encode())
    raw, _ = read_rows([name])
    for seed in (0, 1):
        intake = Intake.of([f"{name}=0.3"], seed=seed)
        used, rejects = intake(raw, "auto")
        assert len(used) + len(rejects) == 400
        assert {each.reason for each in rejects} == {"sampled_out"}
        assert 90 < len(used) < 150  # 120 expected, standard deviation 9
        choices: dict[str, Any] = {}
        blocks = [intake(raw[at : at + 70], "auto", choices=choices) for at in range(0, 400, 70)]
        assert [row for rows, _ in blocks for row in rows] == used


def test_the_seed_chooses(tmp_path: Path) -> None:
    rows = [Row(Origin("x", n), text=f"row {n}") for n in range(50)]

    def chosen(share: float, seed: int) -> set[int]:
        return {row.origin.row for row in rows if _is_taken(row, share, seed)}

    assert chosen(0.5, 0) != chosen(0.5, 1)
    assert chosen(0.3, 0) < chosen(0.6, 0)
    assert chosen(1.0, 0) == set(range(50))


def _is_taken(row: Row, share: float, seed: int) -> bool:
    from truetune.data.formats.checks import RowError

    try:
        return take(row, share, seed=seed) is row
    except RowError:
        return False


@given(st.text(), st.text(), st.floats(0.01, 1), st.integers(0, 5))
def test_the_choice_depends_on_the_content_alone(text: str, file: str, share: float, seed: int) -> None:
    one, other = Row(Origin("x", 1), text=text), Row(Origin(file, 7), text=text)
    assert _is_taken(one, share, seed) == _is_taken(other, share, seed)


def test_a_file_that_several_names_lead_to_is_told(tmp_path: Path) -> None:
    name, other = write(tmp_path / "rows.jsonl"), write(tmp_path / "other.jsonl")
    beside = str(tmp_path / "." / "rows.jsonl")
    assert named_twice([name, other]) == []
    assert named_twice([f"{name}=2", other]) == []
    assert named_twice([name, name]) == [name]
    assert named_twice([f"{name}=0.5", beside]) == [name]
    assert named_twice([other, str(tmp_path)]) == [other]
