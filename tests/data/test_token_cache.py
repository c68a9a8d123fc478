"""Tokenised data kept between runs: what comes back is what was made, or it is made again."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from truetune.data import token_cache
from truetune.data.rejects import Rejects
from truetune.data.schema import Origin, Reject
from truetune.data.token_cache import key_of, through_cache
from truetune.data.token_files import Tokenised
from truetune.data.token_set import TokenSet

KEY = "0" * 64


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRUETUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


def example(first: int = 0) -> Tokenised:
    a, b = Origin("a.jsonl", 1), Origin("b.jsonl", 7)
    train = TokenSet.from_lists([[first, 5, 9], [7]], [[False, True, True], [True]], [b, a])
    held = TokenSet.from_lists([[3]], [[False]], [a])
    faults = [Reject(Origin("c.jsonl", 3), "bad_json", "a sentence\n…\ud800", "raw\x00"), Reject(a, "empty", "none")]
    rejects = Rejects(faults, {("a.jsonl", "sampled_out", "not among them"): 9})
    report = {"read": 4, "rejected": {"z": 2, "a": 1}, "held_out": {"rows": 1}, "nothing": None}
    return Tokenised(train, held, rejects, report, True, (("warn", "[bold] twice"), ("note", "a day")))


def same(one: TokenSet | None, other: TokenSet | None) -> bool:
    if one is None or other is None:
        return one is other
    pairs = [(getattr(one, name), getattr(other, name)) for name in ("tokens", "trained", "offsets")]
    return list(one.origins) == list(other.origins) and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def keep(made: Tokenised, key: str = KEY) -> Tokenised:
    return through_cache(lambda: key, lambda: made)[0]


class MissedError(Exception):
    """Nothing whole was found."""


def kept(key: str = KEY) -> Tokenised | None:
    """The entry, without making one."""

    def miss() -> Tokenised:
        raise MissedError

    try:
        return through_cache(lambda: key, miss)[0]
    except MissedError:
        return None


@pytest.fixture
def entry(folder: Path) -> Path:
    """A whole entry."""
    keep(example())
    return folder / f"{KEY}.safetensors"


@pytest.mark.usefixtures("folder")
def test_what_comes_back_is_what_was_made() -> None:
    made = example()
    assert through_cache(lambda: KEY, lambda: made) == (made, False)
    found, cached = through_cache(lambda: KEY, lambda: pytest.fail("built again"))
    assert cached
    assert same(found.train, made.train)
    assert same(found.held_out, made.held_out)
    assert (found.rejects, found.report, found.templated, found.told) == (
        made.rejects, made.report, made.templated, made.told,
    )  # fmt: skip
    assert list(found.report["rejected"]) == ["z", "a"]  # the most frequent reason stays first


@pytest.mark.usefixtures("folder")
def test_what_is_not_there_comes_back_as_nothing() -> None:
    empty = TokenSet.from_lists([], [], [])
    keep(Tokenised(empty, None, Rejects(), {}))
    found = kept()
    assert found is not None
    assert same(found.train, empty)
    assert (found.held_out, found.rejects, found.report, found.templated, found.told) == (
        None, Rejects(), {}, False, (),
    )  # fmt: skip


@pytest.mark.usefixtures("folder")
def test_without_a_key_nothing_is_kept(folder: Path) -> None:
    made = example()
    assert through_cache(lambda: None, lambda: made) == (made, False)
    assert not folder.exists()


def test_an_error_is_not_kept(folder: Path) -> None:
    def build() -> Tokenised:
        raise ValueError("no rows")

    for _ in range(2):
        with pytest.raises(ValueError, match="no rows"):
            through_cache(lambda: KEY, build)
    assert not folder.exists()


def test_files_that_change_meanwhile_leave_nothing(folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("one")

    def build() -> Tokenised:
        data.write_text("two")
        return example()

    assert not through_cache(lambda: key_of({}, [str(data)]), build)[1]
    assert not folder.exists()


def flip(entry: Path, place: int) -> None:
    raw = bytearray(entry.read_bytes())
    raw[place] ^= 1
    entry.write_bytes(raw)


def test_a_flipped_bit_is_noticed_wherever_it_is(entry: Path) -> None:
    whole = entry.read_bytes()
    for place in range(0, len(whole), 3):
        flip(entry, place)
        assert kept() is None, f"byte {place}: {whole[place - 8 : place + 8]!r}"
        entry.write_bytes(whole)
    assert kept() is not None


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(b"\xff" * 100),
        lambda path: path.write_bytes(b"[]"),
        lambda path: save_file(load_file(path), path),  # no checksum
        lambda path: save_file(load_file(path), path, metadata={"sha256": "0" * 64}),
        lambda path: save_file({"half": torch.ones(2, dtype=torch.bfloat16)}, path, metadata={"sha256": ""}),
    ],
)
def test_a_damaged_entry_is_made_again(entry: Path, damage: Callable[[Path], None]) -> None:
    damage(entry)
    found, cached = through_cache(lambda: KEY, lambda: example(first=4))
    assert (int(found.train.tokens[0]), cached) == (4, False)
    assert int(through_cache(lambda: KEY, example)[0].train.tokens[0]) == 4


def test_an_entry_tells_the_rows_to_nobody_else(entry: Path) -> None:
    if os.name != "posix":
        pytest.skip("permission bits")
    assert entry.stat().st_mode & 0o077 == 0


def test_a_folder_that_cannot_be_made_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRUETUNE_CACHE", str(tmp_path / "file"))
    assert same(keep(example()).train, example().train)
    assert kept() is None


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root writes past permission bits")
def test_a_read_only_folder_gives_what_it_has(entry: Path) -> None:
    entry.parent.chmod(0o500)
    try:
        assert same(keep(example(), "1" * 64).train, example().train)
        assert kept() is not None
        assert os.listdir(entry.parent) == [entry.name]
    finally:
        entry.parent.chmod(0o700)


def test_the_longest_unused_goes_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["1" * 64, "2" * 64, "3" * 64]
    for age, name in enumerate(names):
        keep(example(), name)
        os.utime(folder / f"{name}.safetensors", (time.time() - 100 + age,) * 2)
    size = (folder / f"{names[0]}.safetensors").stat().st_size
    assert kept(names[0])  # which counts as use
    monkeypatch.setattr(token_cache, "LIMIT", 3 * size)
    keep(example(), "4" * 64)
    assert sorted(path.stem for path in folder.iterdir()) == [names[0], names[2], "4" * 64]


def test_an_entry_over_the_limit_is_not_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(example(), "1" * 64)
    monkeypatch.setattr(token_cache, "LIMIT", 100)
    keep(example())
    assert [path.stem for path in folder.iterdir()] == ["1" * 64]


def test_a_disk_that_is_nearly_full_is_left_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage: Any = type("Usage", (), {"free": 5000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    keep(example())
    assert list(folder.iterdir()) == []


HAMMER = """
import sys
from truetune.data.rejects import Rejects
from truetune.data.schema import Origin
from truetune.data.token_set import TokenSet
from truetune.data.token_cache import through_cache
from truetune.data.token_files import Tokenised
train = TokenSet.from_lists([[1, 2]] * 500, [[False, True]] * 500, [Origin("a", 1)] * 500)
made = Tokenised(train, None, Rejects(), {})
hits = 0
for n in range(200):
    found, cached = through_cache(lambda: str(n % 5), lambda: made)
    assert found.train.tokens.tolist() == [1, 2] * 500
    hits += cached
print(hits)
"""


def test_two_processes_at_once_do_each_other_no_harm(folder: Path) -> None:
    runs = [subprocess.Popen([sys.executable, "-c", HAMMER], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    hits = [int(run.communicate()[0]) for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert min(hits) >= 195
    assert sorted(path.stem for path in folder.iterdir()) == list("01234")  # and nothing half written beside them


def test_the_key_depends_on_every_byte_name_and_setting(tmp_path: Path) -> None:
    one, other = tmp_path / "a", tmp_path / "b"
    one.write_bytes(b"12")
    other.write_bytes(b"12")
    keys = {key_of({"x": 1}, [str(one)])}
    keys.add(key_of({"x": 2}, [str(one)]))
    keys.add(key_of({"x": "1"}, [str(one)]))
    keys.add(key_of({"x": 1}, [str(one), str(other)]))
    one.write_bytes(b"13")
    keys.add(key_of({"x": 1}, [str(one)]))
    assert len(keys - {None}) == 5
    assert key_of({"x": 1, "y": "\ud800"}, [str(one)]) == key_of({"y": "\ud800", "x": 1}, [str(one)])


def test_what_cannot_be_read_twice_has_no_key(tmp_path: Path) -> None:
    assert key_of({}, [str(tmp_path / "gone")]) is None
    assert key_of({}, [str(tmp_path)]) is None
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.jsonl")
        assert key_of({}, [str(tmp_path / "pipe.jsonl")]) is None
