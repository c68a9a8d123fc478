"""Rows over the limit."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from truetune.data import token_set
from truetune.data.length import OnOverlong, limit_lengths, truncation
from truetune.data.rejects import EXCERPT
from truetune.data.schema import Origin
from truetune.data.token_set import TokenSet
from truetune.errors import DataError


def rows(*shapes: tuple[int, int]) -> TokenSet:
    """One row for each (prompt, answer) length; tokens count up."""
    return TokenSet.from_lists([list(range(p + a)) for p, a in shapes], [[False] * p + [True] * a for p, a in shapes],
                               [Origin("f.jsonl", i + 1) for i in range(len(shapes))])  # fmt: skip


def limit(data: TokenSet, policy: OnOverlong, most: int = 10) -> tuple[TokenSet, list[str], list[str]]:
    said: list[str] = []
    kept, rejects = limit_lengths(data, most, policy=policy, say=said.append, decode=lambda ids: f"text of {len(ids)}")
    return kept, [f"{r.origin} {r.reason}" for r in rejects], said


@pytest.mark.parametrize("policy", ["auto", "error", "drop", "truncate"])
def test_rows_at_the_limit_are_left_alone_in_silence(policy: OnOverlong) -> None:
    kept, rejects, said = limit(rows((5, 5), (1, 3)), policy)
    assert kept.lengths.tolist() == [10, 4]
    assert (rejects, said) == ([], [])


def test_error_names_every_row_and_its_length() -> None:
    with pytest.raises(DataError, match=r"2 of 3 rows are longer than 10 tokens") as caught:
        limit(rows((5, 6), (1, 3), (9, 9)), "error")
    assert "f.jsonl, row 1: 11 tokens" in str(caught.value)
    assert "f.jsonl, row 3: 18 tokens" in str(caught.value)


@pytest.mark.parametrize(
    ("most", "texts", "ways"),
    [
        (None, False, ["--max-length 18 takes them all"]),
        (18, False, ["--max-length 18 takes them all"]),
        (12, False, ["--max-length 12, the most that the model was made for"]),
        (10, False, []),
        (10, True, ["--text-blocks joins the texts"]),
    ],
)
def test_of_the_ways_out_those_that_help_are_told(most: int | None, texts: bool, ways: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        limit_lengths(rows((5, 6), (9, 9)), 10, policy="error", say=lambda _: None, decode=str, texts=texts, most=most)
    told = [text for label, text in caught.value.notes if label in ("way out", "or") and text]
    assert told[0] == "--on-overlong drop leaves them out, --on-overlong truncate cuts them"
    assert len(told) == 1 + len(ways)
    assert all(text.startswith(way) for text, way in zip(told[1:], ways, strict=True))


def test_drop_lists_what_it_leaves_out() -> None:
    kept, rejects, said = limit(rows((5, 6), (1, 3)), "drop")
    assert kept.lengths.tolist() == [4]
    assert [origin.row for origin in kept.origins] == [2]
    assert rejects == ["f.jsonl, row 1 over_length"]
    assert "f.jsonl, row 1 (11)" in said[0]


def test_auto_leaves_one_row_out_and_refuses_two_of_a_few() -> None:
    assert len(limit(rows((5, 6), *[(1, 3)] * 9), "auto")[0]) == 9
    with pytest.raises(DataError):
        limit(rows((5, 6), (5, 6), *[(1, 3)] * 9), "auto")


def test_auto_leaves_out_one_in_a_hundred() -> None:
    assert len(limit(rows(*[(5, 6)] * 3, *[(1, 3)] * 297), "auto")[0]) == 297
    with pytest.raises(DataError):
        limit(rows(*[(5, 6)] * 4, *[(1, 3)] * 296), "auto")


def test_truncate_cuts_the_start_of_the_prompt_but_not_what_opens_the_text() -> None:
    kept, rejects, said = limit(rows((10, 4)), "truncate")
    tokens, trained = kept.example(0)
    assert tokens.tolist() == [0, 5, 6, 7, 8, 9, 10, 11, 12, 13]
    assert trained.tolist() == [False] * 6 + [True] * 4
    assert rejects == []
    assert "f.jsonl, row 1 (14)" in said[0]


def test_truncate_cuts_a_long_answer_s_end_and_with_it_the_stop_token() -> None:
    tokens, trained = limit(rows((4, 20)), "truncate")[0].example(0)
    assert tokens.tolist() == [0, 3, 4, 5, 6, 7, 8, 9, 10, 11]  # a quarter of the limit stays prompt
    assert trained.tolist() == [False, False] + [True] * 8


@given(st.integers(0, 40), st.integers(1, 40), st.integers(2, 30))
def test_truncate_fits_keeps_the_opening_and_learns_something(prompt: int, answer: int, most: int) -> None:
    data = rows((prompt, answer))
    tokens, trained = limit(data, "truncate", most)[0].example(0)
    assert len(tokens) == min(most, prompt + answer)
    assert int(tokens[0]) == 0
    assert bool(trained[1:].any()) or prompt + answer == 1
    assert bool((tokens.diff() > 0).all())  # nothing is reordered or repeated
    assert trained.tolist() == [int(t) >= prompt for t in tokens]


def test_a_text_loses_its_end_only() -> None:
    assert limit(rows((0, 15)), "truncate")[0].example(0)[0].tolist() == list(range(10))


def test_what_was_cut_off_is_counted() -> None:
    data = rows((10, 4), (1, 3), (0, 15))
    assert truncation(data, limit(data, "truncate")[0]) == {"rows": 2, "tokens": 9, "without_stop": 1}
    assert truncation(data, limit(data, "drop")[0]) == {"rows": 0, "tokens": 0, "without_stop": 0}


def test_what_was_cut_off_is_counted_where_shorter_rows_are_looked_at_in_other_stretches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(token_set, "_TOKENS", 8)
    data = rows((10, 4), (1, 3), (0, 15), (1, 1), (4, 20), (0, 6))
    cut = limit(data, "truncate", 4)[0]
    assert [len(part) for part in data.stretches()] != [len(part) for part in cut.stretches()]
    assert truncation(data, cut) == {"rows": 4, "tokens": 10 + 11 + 20 + 2, "without_stop": 4}


def test_a_row_whose_stop_token_is_cut_off_is_said() -> None:
    assert "(1 within an answer, which then has no stop token)" in limit(rows((4, 20), (10, 4)), "truncate")[2][0]
    assert "stop token" not in limit(rows((10, 4)), "truncate")[2][0]


@pytest.mark.parametrize(("policy", "words"), [("drop", "1 row over 10 tokens is left out"),
                                               ("truncate", "1 row over 10 tokens was cut")])  # fmt: skip
def test_one_row_is_one_row(policy: OnOverlong, words: str) -> None:
    assert words in limit(rows((5, 6)), policy)[2][0]


def test_a_row_that_is_left_out_is_shown_by_its_start() -> None:
    _, (reject,) = limit_lengths(rows((300, 6)), 10, policy="drop", say=print, decode=str)
    assert reject.raw.startswith("[0, 1, 2, 3")
    assert len(reject.raw) == EXCERPT
