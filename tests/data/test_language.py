"""Letters by script, and rows that hold program code."""

import pytest

from truetune.data.language import holds_code, scripts


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("plain words", "latin"), ("déjà vu, Straße", "latin"), ("привет мир", "cyrillic"), ("解释为什么", "chinese"),
        ("ひらがなカタカナ", "japanese"), ("안녕하세요", "korean"), ("مرحبا بالعالم", "arabic"),
        ("שלום עולם", "hebrew"),
        ("καλημέρα", "greek"), ("नमस्त", "devanagari"), ("สวสด", "thai"), ("ბათუმი", "georgian"),
        ("𠀋𠀌", "chinese"), ("Ａｂｃ", "latin"), ("𝕏𝕐", "other"),
    ],
)  # fmt: skip
def test_a_text_of_one_script_is_counted_as_that(text: str, script: str) -> None:
    assert scripts([text]) == {script: 1.0}


def test_shares_are_of_letters_over_all_texts_largest_first() -> None:
    shares = scripts(["abcdef 12 34", "при", "水", "\ud83d"])
    assert list(shares.items()) == [("latin", 0.6), ("cyrillic", 0.3), ("chinese", 0.1)]


def test_a_long_text_is_counted_whole() -> None:
    assert scripts(["я" + "a" * 200_000 + "я" * 200_000]) == {"cyrillic": 0.5, "latin": 0.5}


def test_without_a_letter_there_is_no_share() -> None:
    assert scripts(["12", "", "…"]) == {}


@pytest.mark.parametrize(
    "text",
    ["Here:\n```\nx\n```", "def f(x):\n    return (x)\n", "for (int i = 0; i < n; i++) {\n  s += i;\n}",
     "import os\nfrom a.b import c", "<ul>\n<li>\n"],
)  # fmt: skip
def test_code_is_seen(text: str) -> None:
    assert holds_code(text)


@pytest.mark.parametrize(
    "text",
    ["Import taxes rose.\nReturn to sender.", "A list:\n- one\n- two", "While we wait (for you)\nIf so, fine", ""],
)
def test_prose_is_no_code(text: str) -> None:
    assert not holds_code(text)
