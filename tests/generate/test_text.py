"""Text as it comes: whole characters, and never a part of a stop text."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving import Bytes
from truetune.generate.text import TextStream


def shown(text: bytes, stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    stream = TextStream(Bytes.hf, stop)
    parts = []
    for byte in text:
        parts.append(stream.push(byte))
        if stream.stopped:
            return parts, True
    parts.append(stream.end())
    return parts, stream.stopped


@given(st.text(max_size=20))
def test_nothing_is_lost_and_no_character_is_cut(text: str) -> None:
    parts, _ = shown(text.encode())
    assert "".join(parts) == text
    assert not any("\ufffd" in part for part in parts) or "\ufffd" in text


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_what_is_shown_ends_before_the_first_stop(text: str, stop: list[str]) -> None:
    parts, stopped = shown(text.encode(), tuple(stop))
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    if not ends:
        assert ("".join(parts), stopped) == (text, False)
    else:
        first = min(end for end, _ in ends)
        assert stopped
        assert "".join(parts) == text[: min(at for end, at in ends if end == first)]


def test_what_may_begin_a_stop_is_held_back() -> None:
    assert shown(b"abXYc", ("XYZ",))[0][:5] == ["a", "b", "", "", "XYc"]


def test_bytes_that_are_no_character_come_out_in_the_end() -> None:
    assert "".join(shown(b"a\xff")[0]) == "a\ufffd"


@pytest.mark.parametrize("width", [1, 2, 3])
def test_a_space_that_a_decoder_puts_between_words_is_kept(width: int) -> None:
    class Words:
        @staticmethod
        def decode(ids: list[int], **_: Any) -> str:
            return " ".join("abcdef"[i] * width for i in ids)

    stream = TextStream(Words)
    assert "".join([*(stream.push(i) for i in (0, 1, 2)), stream.end()]) == Words.decode([0, 1, 2])
