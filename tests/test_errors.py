"""How numbers are worded for people."""

from __future__ import annotations

import pytest

from truetune.errors import counted


@pytest.mark.parametrize(
    ("number", "words"), [(0, "0 rows"), (1, "1 row"), (2, "2 rows"), (3512, "3,512 rows")], ids=str
)
def test_one_is_one(number: int, words: str) -> None:
    assert counted(number, "row") == words


def test_a_verb_goes_along() -> None:
    assert [counted(n, "row is cut", "rows are cut") for n in (1, 2)] == ["1 row is cut", "2 rows are cut"]
