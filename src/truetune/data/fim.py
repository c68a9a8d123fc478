"""Fill in the middle: a document cut in three and told in another order, so that a model learns to write what lies
between two texts.  Bavarian et al. 2022, arXiv:2207.14255, section 3.

PSM: <pre> prefix <suf> suffix <mid> middle. SPM, in the form that shares its tokens with PSM (appendix D): <pre> <suf>
suffix <mid> prefix middle. The cuts are between characters, uniform and independent of each other; the end token
follows the middle. All of it carries a loss, as in the paper.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from truetune.data.schema import Row
from truetune.data.split import content_hash
from truetune.data.template import TextEncoder
from truetune.errors import ConfigError

# (prefix, suffix, middle), as code models call them.
FAMILIES: Sequence[tuple[str, str, str]] = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen2.5-Coder, CodeGemma
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek-Coder
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),  # Code Llama
    ("[PREFIX]", "[SUFFIX]", "[MIDDLE]"),  # Codestral's names
)
_SPM = 0.5  # of the transformed documents, as in the paper's joint training


@dataclass(frozen=True)
class FillInTheMiddle:
    """Transforms a share of texts; which, and where they are cut, is told by their content and the seed."""

    tokens: tuple[str, str, str]
    rate: float
    seed: int = 0

    @classmethod
    def of(cls, encoder: TextEncoder, rate: float, *, seed: int) -> FillInTheMiddle | None:
        """With the tokens that the tokenizer has; None for a rate of 0.

        Raises:
            ConfigError: it has none of the families' tokens.
        """
        if not rate:
            return None
        for tokens in FAMILIES:
            if all(encoder.has_token(token) for token in tokens):
                return cls(tokens, rate, seed)
        raise ConfigError(
            "--fim-rate: the tokenizer has no tokens to fill in the middle with",
            ("expected", "those of a code model, such as " + " ".join(FAMILIES[0])),
            ("way out", "a base that was trained with such tokens, or no --fim-rate"),
        )

    def __call__(self, row: Row) -> Row:
        """The row with its text told in another order; as it is where chance does not choose it, or it is no text."""
        text, (prefix_mark, suffix_mark, middle_mark) = row.text, self.tokens
        if len(text) < 3 or any(token in text for token in self.tokens):
            return row
        choice, order, one, other = self._draws(row)
        if choice >= self.rate:
            return row
        start, end = sorted((int(one * (len(text) + 1)), int(other * (len(text) + 1))))
        prefix, middle, suffix = text[:start], text[start:end], text[end:]
        if order < _SPM:
            told = f"{prefix_mark}{suffix_mark}{suffix}{middle_mark}{prefix}{middle}"
        else:
            told = f"{prefix_mark}{prefix}{suffix_mark}{suffix}{middle_mark}{middle}"
        return replace(row, text=told)

    def _draws(self, row: Row) -> tuple[float, ...]:
        """Four numbers in [0, 1)."""
        digest = hashlib.sha256(f"fim {self.seed} {content_hash(row)}".encode()).digest()
        return tuple(int.from_bytes(digest[at : at + 6], "big") / 2**48 for at in range(0, 24, 6))
