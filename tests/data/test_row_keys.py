"""Which of many rows say the same, found share by share with few of their keys in memory."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from truetune.data import row_keys
from truetune.data.duplicates import LISTED
from truetune.data.row_keys import Keys, RowKeys, Side, compare

# Few kinds, so that many rows repeat; spread over both halves of the range, so that a share holds some out.
KINDS = np.random.default_rng(0).integers(-(1 << 63), 1 << 63, 40, dtype=np.int64)
kinds = st.lists(st.integers(0, len(KINDS) - 1), max_size=60)


def keys_of(found: list[int], path: Path, *, parts: int = 3) -> RowKeys:
    return RowKeys.write(path, np.array_split(KINDS[found], parts))


def plain_repeats(keys: Keys, wanted: list[bool]) -> list[tuple[int, int]]:
    """Each wanted row that repeats an earlier wanted one, with the first."""
    first: dict[int, int] = {}
    pairs = [(row, first.setdefault(key, row)) for row, key in enumerate(keys.tolist()) if wanted[row]]
    return [(row, other) for row, other in pairs if row != other]


@settings(deadline=None)
@given(found=kinds, others=kinds, share=st.sampled_from([0.0, 0.3]), size=st.integers(1, 70))
def test_repeats_and_leaks_are_those_of_the_plain_way(
    found: list[int], others: list[int], share: float, size: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("keys")
    ours, theirs = Side(keys_of(found, folder / "a"), share), Side(keys_of(others, folder / "b"), 0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_keys, "_SHARE", size)
        patch.setattr(row_keys, "_STRETCH", max(1, size // 3))
        repeats, leaked = compare(ours, theirs, first=(len(found), len(others)))
        mine = ours.first(len(found)).tolist()
        held = Side(ours.keys, share, held=True)
        assert [not side for side in held.first(len(found)).tolist()] == mine
        assert (ours.count(), held.count()) == (sum(mine), len(mine) - sum(mine))
    again = plain_repeats(KINDS[found], mine)
    assert (repeats.count, repeats.named) == (len(again), again[:LISTED])
    assert [row for row in range(len(found)) if mine[row] and not repeats.spared[row]] == [row for row, _ in again]
    known = {kind for kind, side in zip(found, mine, strict=True) if side}
    shared = [row for row, kind in enumerate(others) if kind in known]
    assert [row for row, _ in leaked.named] == shared[:LISTED]
    assert leaked.count == len(shared)
    assert np.flatnonzero(~leaked.spared).tolist() == shared
    assert compare(ours, None, first=(0, 0))[1].count == 0


def test_of_long_lists_the_first_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_keys, "_SHARE", 64)
    found = [n % len(KINDS) for n in range(400)]
    repeats, _ = compare(Side(keys_of(found, tmp_path / "keys"), 0.0), None, first=(5, 0))
    assert repeats.count == 400 - len(KINDS)
    assert repeats.named == [(len(KINDS) + n, n) for n in range(LISTED)]
    assert repeats.spared.tolist() == [True] * 5


class Counted(RowKeys):
    """Tells how often all keys are gone through."""

    passes = 0

    def stretches(self) -> Iterator[tuple[int, Keys]]:
        Counted.passes += 1
        return super().stretches()


@pytest.mark.parametrize("shares", [1, 64])
def test_however_many_shares_there_are_the_keys_are_read_twice(
    shares: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = 4096
    monkeypatch.setattr(row_keys, "_SHARE", rows // shares)
    monkeypatch.setattr(Counted, "passes", 0)
    half = np.random.default_rng(0).integers(-(1 << 63), 1 << 63, rows // 2, dtype=np.int64)
    keys = Counted(RowKeys.write(tmp_path / "keys", [half, half]).path, rows)
    assert compare(Side(keys, 0.0), None, first=(0, 0))[0].count == rows // 2
    assert Counted.passes <= 3  # to see which are wanted is another one, which ends at the last that is asked for


def test_nothing_is_left_beside_the_keys(tmp_path: Path) -> None:
    keys = keys_of([1, 2, 1], tmp_path / "keys")
    assert compare(Side(keys, 0.0), Side(keys, 0.0), first=(0, 0))[0].named == [(2, 0)]
    assert [path.name for path in tmp_path.iterdir()] == ["keys"]


def peak_bytes() -> int:
    """The most memory that this process has had since ``/proc/self/clear_refs`` was told 5."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="what a process holds is told on Linux")
def test_comparing_takes_few_bytes_a_row(tmp_path: Path) -> None:
    rows, part = 2_000_000, 100_000
    draw = np.random.default_rng(0)
    parts = (draw.integers(-(1 << 63), 1 << 63, part, dtype=np.int64) for _ in range(rows // part))
    keys = RowKeys.write(tmp_path / "keys", parts)
    few = RowKeys(keys.path, 1000)
    compare(Side(few, 0.5), Side(few, 0.5, held=True), first=(0, 0))  # what is needed once, whatever the rows
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_bytes()
    mine, held = Side(keys, 0.5), Side(keys, 0.5, held=True)
    assert mine.count() + held.count() == rows
    assert compare(mine, held, first=(0, 0))[0].count == 0
    assert (peak_bytes() - before) / rows < 8  # a list of the keys alone takes 8
