"""Answers that are known by their text alone: where they part from the trained model's, and by how much."""

import math
from collections.abc import Sequence

import pytest
import torch

from truetune.recipes.verify_compare import Finding
from truetune.recipes.verify_report import show
from truetune.recipes.verify_texts import alike, gap_at, parts_at

WORDS = {
    0: "",
    1: " the",
    2: " cat",
    3: " c",
    4: "at",
    5: " dog",
    6: "\N{REPLACEMENT CHARACTER}",
    7: 5 * " ",
    8: "return",
}


def decode(ids: Sequence[int]) -> str:
    """Token 0 ends an answer; 6 and 4 together are one character."""
    return "".join(WORDS[number] for number in ids).replace("\N{REPLACEMENT CHARACTER}at", "ä").removeprefix(" ")


@pytest.mark.parametrize(
    ("own", "ended", "text", "place"),
    [
        ((1, 2, 5), False, " the cat dog", None),
        ((1, 2, 5), False, "the cat cat", 2),
        ((1, 2, 5), False, "the", 1),  # it ended there
        ((1, 2, 0), True, "the cat dog", 2),  # it went on
        ((1, 6, 4), False, "theä", None),
        ((1, 6, 4), False, "theö", 2),
        ((7, 8, 2), False, "    return cat", None),
        ((7, 8, 2), False, "     return cat", None),  # the one blank that the decoder takes off
        ((7, 8, 2), False, "   return cat", None),  # and the one that another one would
        ((7, 8, 2), False, "        return cat", 1),  # indented twice
        ((7, 8, 2), False, "return cat", 0),
    ],
)
def test_where_a_text_parts(own: tuple[int, ...], ended: bool, text: str, place: int | None) -> None:
    assert parts_at(own, ended, text, decode) == place


@pytest.mark.parametrize(
    ("text", "gap"),
    [
        ("the cat", 0.25),  # by the likelier of " cat" and " c"
        ("the", 3.0),  # ended
        ("the mouse", math.inf),
    ],
)
def test_the_gap_is_that_of_the_likeliest_token_that_fits(text: str, gap: float) -> None:
    likely = torch.tensor([5, 2, 3, 0]), torch.tensor([-0.5, -0.75, -1.5, -3.5])
    assert gap_at(1, (1, 5), text, likely, decode) == gap


@pytest.mark.parametrize(
    ("text", "gap"), [("        return", 2.0), ("    return", 0.5), ("      ", math.inf), ("    ", 4.0)]
)
def test_indentation_that_is_doubled_is_another_token(text: str, gap: float) -> None:
    likely = torch.tensor([1, 8, 7, 0]), torch.tensor([-0.5, -1.0, -2.5, -4.5])
    assert gap_at(1, (7, 1), text, likely, decode) == gap


def test_a_blank_in_front_is_not_another_answer() -> None:
    assert alike(" the cat", "the cat")
    assert not alike("the cat", "the cat ")


def test_more_than_one_blank_in_front_is_the_answer_s_own() -> None:
    assert alike("    x", "     x")
    assert not alike("    x", "x")
    assert not alike("    return x", "        return x")
    assert not alike("  x", "x")
    assert not alike(" x", "\nx")


def test_an_example_is_shown_from_shortly_before_it_parts(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {"prompt": {"row": "a.jsonl, row 1", "trained": "<s>" + 30 * "x" + "one", "found": "<s>" + 30 * "x" + "two"},
            "answer": {"row": "a.jsonl, row 2", "trained": "the same", "found": "the same"}}  # fmt: skip
    show([Finding("merged", "truetune", "bf16", "drift", ["why"], example=rows)], title="")
    said = capsys.readouterr().out
    assert f"merged: the prompt of a.jsonl, row 1 was '…{12 * 'x'}one', and is '…{12 * 'x'}two'" in said
    assert "merged: the answer of a.jsonl, row 2: the same text, in other tokens" in said
    show([Finding("merged", "truetune", "bf16", "faithful", [], example=rows)], title="")
    assert "a.jsonl" not in capsys.readouterr().out
