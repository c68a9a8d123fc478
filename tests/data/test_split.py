"""Held-out rows by a hash of their content."""

import pytest

from truetune.data.schema import Message, Origin, Row
from truetune.data.split import content_hash, split


def rows(count: int, file: str = "a") -> list[Row]:
    return [Row(Origin(file, i + 1), (Message("user", f"q{i}"), Message("assistant", "a"))) for i in range(count)]


def test_every_row_is_on_one_side() -> None:
    train, held = split(rows(500), 0.2)
    assert sorted(row.origin.row for row in [*train, *held]) == list(range(1, 501))


def test_about_the_share_asked_for_is_held_out() -> None:
    assert 0.17 < len(split(rows(5000), 0.2)[1]) / 5000 < 0.23  # five standard errors


def test_new_rows_move_no_old_one() -> None:
    before = {row.origin.row for row in split(rows(100), 0.3)[1]}
    after = {row.origin.row for row in split(rows(300), 0.3)[1]}
    assert before == {row for row in after if row <= 100}


def test_a_larger_share_keeps_what_was_held_out() -> None:
    small, large = ({row.origin.row for row in split(rows(200), share)[1]} for share in (0.1, 0.3))
    assert small < large


def test_the_same_words_in_another_file_fall_on_the_same_side() -> None:
    ours, theirs = split(rows(200, "a"), 0.3)[1], split(list(reversed(rows(200, "b"))), 0.3)[1]
    assert {row.origin.row for row in ours} == {row.origin.row for row in theirs}


@pytest.mark.parametrize(
    "other",
    [
        Row(Origin("a", 1), (Message("user", "q"), Message("assistant", "b"))),
        Row(Origin("a", 1), (Message("system", "q"), Message("assistant", "a"))),
        Row(Origin("a", 1), (Message("user", "q"), Message("assistant", "a")), tools=({"name": "t"},)),
        Row(Origin("a", 1), text="q a"),
    ],
)
def test_other_words_have_another_hash(other: Row) -> None:
    assert content_hash(other) != content_hash(Row(Origin("a", 1), (Message("user", "q"), Message("assistant", "a"))))
