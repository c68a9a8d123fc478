"""Fill in the middle: nothing of a text is lost, and everything follows from its content."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from truetune.data.fim import FAMILIES, FillInTheMiddle
from truetune.data.mask import encode_rows
from truetune.data.schema import Message, Origin, Row
from truetune.errors import ConfigError
from truetune.models.tokenizer import ChatTokenizer

MARKS = FAMILIES[0]
ALWAYS = FillInTheMiddle(MARKS, 1.0)


def document(text: str, file: str = "x") -> Row:
    return Row(Origin(file, 1), text=text)


def put_together(told: str) -> str:
    """The document back, from either order."""
    before, suffix_mark, rest = told.removeprefix(MARKS[0]).partition(MARKS[1])
    suffix, middle_mark, middle = rest.partition(MARKS[2])
    assert (suffix_mark, middle_mark) == MARKS[1:]
    if before:  # PSM
        return before + middle + suffix
    return middle + suffix  # SPM: the prefix stands in front of the middle; PSM with an empty prefix reads the same


@given(st.text(min_size=3, max_size=60))
def test_every_character_is_told_once(text: str) -> None:
    told = ALWAYS(document(text)).text
    assert told.startswith(MARKS[0])
    assert put_together(told) == text


def test_both_orders_occur_and_the_rate_is_kept() -> None:
    rows = [document(f"def f{n}(): return {n}") for n in range(400)]
    half = FillInTheMiddle(MARKS, 0.5, seed=3)
    told = [half(row).text for row in rows]
    changed = [text for text, row in zip(told, rows, strict=True) if text != row.text]
    assert 160 < len(changed) < 240  # 200 expected, standard deviation 10
    suffix_first = [text for text in changed if text.startswith(MARKS[0] + MARKS[1])]
    assert 70 < len(suffix_first) < 150
    assert [half(row).text for row in reversed(rows)][::-1] == told
    assert [FillInTheMiddle(MARKS, 0.5, seed=4)(row).text for row in rows] != told
    assert half(document(rows[0].text, "other")).text == told[0]


def test_what_is_no_plain_text_stays_as_it_is() -> None:
    chat = Row(Origin("x", 1), (Message("user", "a"), Message("assistant", "b")))
    marked = document(f"a {MARKS[1]} b")
    assert [ALWAYS(row) for row in (chat, marked, document("ab"))] == [chat, marked, document("ab")]


def test_a_tokenizer_without_the_tokens_is_refused(tiny_model: Path) -> None:
    encoder = ChatTokenizer.load(str(tiny_model))
    assert FillInTheMiddle.of(encoder, 0.0, seed=0) is None
    with pytest.raises(ConfigError, match=r"--fim-rate: the tokenizer has no tokens"):
        FillInTheMiddle.of(encoder, 0.5, seed=0)


@pytest.mark.parametrize("tokens", FAMILIES)
def test_the_marks_become_single_tokens_and_all_is_learned(tokens: tuple[str, str, str], tiny_model: Path) -> None:
    encoder = ChatTokenizer.load(str(tiny_model))
    encoder.hf.add_special_tokens({"additional_special_tokens": list(tokens)})
    retold = FillInTheMiddle.of(encoder, 1.0, seed=0)
    examples, rejects = encode_rows([document("def f(): pass")], None, encoder, train_on="all", retold=retold)
    ids, flags = (t.tolist() for t in examples.example(0))
    assert rejects == []
    assert [ids.count(encoder.hf.convert_tokens_to_ids(token)) for token in tokens] == [1, 1, 1]
    assert all(flags)
    assert ids[-1] in encoder.stop_ids
