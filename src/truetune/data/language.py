"""What the rows are written in: letters by script, and rows that hold program code. Counted, never guessed finer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

import numpy as np

# Where Unicode's blocks change their script: (first code point, script). What is none of these is "other".
_BLOCKS = (
    (0x0000, "latin"), (0x0370, "greek"), (0x0400, "cyrillic"), (0x0530, "armenian"), (0x0590, "hebrew"),
    (0x0600, "arabic"), (0x0700, "other"), (0x0750, "arabic"), (0x0780, "other"), (0x08A0, "arabic"),
    (0x0900, "devanagari"), (0x0980, "bengali"), (0x0A00, "other"), (0x0B80, "tamil"), (0x0C00, "other"),
    (0x0E00, "thai"), (0x0E80, "other"), (0x10A0, "georgian"), (0x1100, "korean"), (0x1200, "other"),
    (0x1E00, "latin"), (0x1F00, "greek"), (0x2000, "other"), (0x2C60, "latin"), (0x2C80, "other"),
    (0x2E80, "chinese"), (0x3040, "japanese"), (0x3100, "chinese"), (0x3130, "korean"), (0x3190, "chinese"),
    (0x31F0, "japanese"), (0x3200, "chinese"), (0xA000, "other"), (0xA720, "latin"), (0xA800, "other"),
    (0xAC00, "korean"), (0xD800, "other"), (0xF900, "chinese"), (0xFB00, "other"), (0xFF21, "latin"),
    (0xFF5B, "other"), (0xFF66, "japanese"), (0xFFA0, "other"), (0x20000, "chinese"), (0x32000, "other"),
)  # fmt: skip
_STARTS = np.array([start for start, _ in _BLOCKS], np.uint32)
_NO_LETTERS = bytes(point for point in range(128) if not chr(point).isalpha())
_CHUNK = 1 << 16  # characters of a text that are counted at once

# Lines that prose does not hold: a statement's end or opening, a definition, an import, a tag, a query.
_CODE = re.compile(
    r"^\s*(?:def \w+\(|class \w+[:({]|import \w|from \w[\w.]* import |#include\s*<|public |private |function\s+\w+\("
    r"|(?:const|let|var) \w+ ?=|return\b.*[;)\]]|(?:for|if|while) ?\(|SELECT .+ FROM |</?\w+[^>]*>\s*$|.*[;{}]\s*$)",
    re.MULTILINE,
)
_CODE_LINES = 2


def scripts(texts: Iterable[str]) -> dict[str, float]:
    """The share of each script among the letters of ``texts``, the largest first; empty where there is no letter."""
    return shares(letters(texts))


def letters(texts: Iterable[str]) -> Counter[str]:
    """How many letters of each script there are in ``texts``."""
    counts: Counter[str] = Counter()
    for text in texts:
        for start in range(0, len(text), _CHUNK):
            counts.update(_letters(text[start : start + _CHUNK]))
    return counts


def shares(counts: Counter[str]) -> dict[str, float]:
    """``scripts`` of texts whose letters are counted already."""
    total = sum(counts.values())
    return {name: round(n / total, 4) for name, n in counts.most_common()}


def holds_code(text: str) -> bool:
    """Whether a text has a fenced block, or two lines that look like a program's."""
    return "```" in text or sum(1 for _ in zip(range(_CODE_LINES), _CODE.finditer(text), strict=False)) == _CODE_LINES


def _letters(text: str) -> dict[str, int]:
    if text.isascii():
        count = len(text.encode().translate(None, _NO_LETTERS))
        return {"latin": count} if count else {}
    letters = "".join(filter(str.isalpha, text))
    points = np.frombuffer(letters.encode("utf-32-le", "surrogatepass"), np.uint32)
    counted = np.bincount(np.searchsorted(_STARTS, points, side="right") - 1, minlength=len(_BLOCKS))
    found: Counter[str] = Counter()
    for (_, name), n in zip(_BLOCKS, counted.tolist(), strict=True):
        if n:
            found[name] += n
    return found
