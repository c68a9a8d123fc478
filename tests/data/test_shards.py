"""Sets in files say the same as sets in memory."""

from pathlib import Path

import pytest

from truetune.data import token_set
from truetune.data.length import limit_lengths, truncation
from truetune.data.schema import Origin
from truetune.data.shards import write_set
from truetune.data.token_set import TokenSet

NAMES = ["b.jsonl", "a.jsonl"]


@pytest.fixture
def in_memory() -> TokenSet:
    lengths = [14, 4, 15, 2, 24, 6]
    origins = [Origin(NAMES[i // 3], i % 3 + 1) for i in range(len(lengths))]
    trained = [[n > 2 for n in range(length)] for length in lengths]
    return TokenSet.from_lists([list(range(length)) for length in lengths], trained, origins)


def test_the_files_of_a_set_are_named_once_and_in_order(in_memory: TokenSet, tmp_path: Path) -> None:
    assert in_memory.files() == NAMES
    assert write_set(tmp_path, "set", [in_memory], NAMES).files() == NAMES
    assert TokenSet.from_lists([], [], []).files() == []


def test_what_was_cut_off_a_set_in_files_is_counted(
    in_memory: TokenSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_set, "_TOKENS", 8)
    whole = write_set(tmp_path, "set", [in_memory], NAMES)
    cut, _ = limit_lengths(whole, 4, policy="truncate", say=lambda _: None, decode=str)
    assert cut.lengths.tolist() == [4, 4, 4, 2, 4, 4]
    assert truncation(whole, cut) == {"rows": 4, "tokens": 10 + 11 + 20 + 2, "without_stop": 3}
