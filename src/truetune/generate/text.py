"""From tokens to text as they come: no half characters, and nothing that may turn out to begin a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_UNFINISHED = "\ufffd"  # what a decoder puts for a character of which bytes are missing
_LONGEST_CHARACTER = 8  # tokens; one that is unfinished for longer is no character


class TextStream:
    """The text of one answer.

    A decoder looks at neighbours (the space in front of a word, bytes of one character), so what is new is the
    difference between two decodings that start at the same token, a little way back.

    Args:
        tokenizer: transformers' own.
        stop: texts that end the answer.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(text for text in stop if text)
        self._ids: list[int] = []
        self._from, self._read = 0, 0
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """What is certain with this token; afterwards ``stopped`` says whether a stop text was met."""
        self._ids.append(token)
        before = self._decode(self._ids[self._from : self._read])
        whole = self._decode(self._ids[self._from :])
        if whole == before:  # a token that says nothing, and begins no character
            self._read = len(self._ids)
            return ""
        unfinished = whole.endswith(_UNFINISHED) and len(self._ids) - self._read < _LONGEST_CHARACTER
        if unfinished or len(whole) <= len(before):
            return ""
        self._from, self._read = self._read, len(self._ids)
        return self._let_go(whole[len(before) :])

    def end(self) -> str:
        """What was still held back, at the end of an answer that no stop text ended."""
        if self.stopped:
            return ""
        before = self._decode(self._ids[self._from : self._read])
        rest = self._held + self._decode(self._ids[self._from :])[len(before) :]
        self._held, self._from, self._read = "", len(self._ids), len(self._ids)
        if not self._stop:
            return rest
        return self._let_go(rest) + self._release()

    def _release(self) -> str:
        held, self._held = self._held, ""
        return "" if self.stopped else held

    def _let_go(self, new: str) -> str:
        text = self._held + new
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True)) if ids else ""


def _overlap(text: str, stop: str) -> int:
    """The longest end of ``text`` that ``stop`` begins with, short of all of it."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
