"""What the tokenizer keys of a GGUF make llama.cpp do: how it frames a text, where an answer ends, and in what it
differs from another tokenizer.

What a file leaves out, llama.cpp fills in by the kind of tokenizer; so does this.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from truetune.export.gguf_tokenizer import TokenType

_OWN = "tokenizer.ggml."
# llama.cpp ends an answer at these by their text, whatever the keys say.
_ENDS = frozenset({
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>", "</s>",
    "<|eom_id|>", "<EOT>", "<|end_of_text|>", "<end_of_utterance>", "<eos>",
})  # fmt: skip
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {"bos_token_id": 1, "eos_token_id": 2, "add_bos_token": True, "add_space_prefix": True},
    "gpt2": {"bos_token_id": 11, "eos_token_id": 11, "add_bos_token": False, "add_space_prefix": False},
    "t5": {"bos_token_id": None, "eos_token_id": 1, "add_bos_token": False, "add_space_prefix": True},
}
_ADDS_BOS = ("llama-bpe", "tekken")  # byte-level ones that are known to, where no key says otherwise


@dataclass(frozen=True)
class Vocabulary:
    """The keys under ``tokenizer`` of one file."""

    keys: Mapping[str, Any]

    def get(self, name: str) -> Any:
        """``tokenizer.ggml.NAME``, or what llama.cpp takes in its place."""
        found = self.keys.get(_OWN + name)
        if found is not None:
            return found
        if name == "add_bos_token" and self.keys.get(f"{_OWN}pre") in _ADDS_BOS:
            return True
        return _DEFAULTS.get(str(self.keys.get(f"{_OWN}model")), {}).get(name)

    @property
    def tokens(self) -> Sequence[str]:
        """By id."""
        return self.keys.get(f"{_OWN}tokens") or ()

    @property
    def template(self) -> str | None:
        """Jinja source."""
        return self.keys.get("tokenizer.chat_template")

    @property
    def opening(self) -> str:
        """The token that llama.cpp puts in front of every text, as it is written; "" for none."""
        number = self.get("bos_token_id")
        return self.tokens[number] if self.get("add_bos_token") and number is not None else ""

    @property
    def stop_ids(self) -> frozenset[int]:
        """What ends an answer."""
        named = {self.get(f"{kind}_token_id") for kind in ("eos", "eot", "eom")} - {None}
        return frozenset(named | {number for number, token in enumerate(self.tokens) if token in _ENDS})

    def framed(self, text: str) -> str:
        """A rendered prompt as llama.cpp's server reads it: with its own opening, and never with two of them."""
        return self.opening + text.removeprefix(self.opening) if self.opening else text


def differences(found: Vocabulary, expected: Vocabulary) -> list[str]:
    """In what a file reads texts otherwise than the tokenizer that trained, as sentences.

    How a text begins, what is put in front of it, and where an answer ends are seen by the prompts and the stop tokens
    themselves.
    """
    said = []
    for name, what in (("model", "the kind of tokenizer"), ("pre", "how texts are cut into words")):
        if found.get(name) != expected.get(name):
            said.append(f"{what} ({_OWN}{name}) is {found.get(name)} in the file, and was {expected.get(name)}")
    if found.get("add_eos_token"):
        said.append("every prompt would end in the end token: tokenizer.ggml.add_eos_token is set")
    said += _other_tokens(found, expected)
    one, other = (list(filter(None, words.get("merges") or ())) for words in (found, expected))
    if one != other and found.get("model") == "gpt2":
        said.append("it joins pieces by other rules: tokenizer.ggml.merges differ")
    if not said and _other_scores(found, expected):
        said.append("it joins pieces in another order: tokenizer.ggml.scores differ")
    return said


def _other_tokens(found: Vocabulary, expected: Vocabulary) -> list[str]:
    # Rows of the table without a token have any name.
    kinds, wanted = found.get("token_type") or (), expected.get("token_type") or ()
    real = [number for number, kind in enumerate(wanted) if kind != TokenType.UNUSED]
    if other := [n for n in real if n >= len(found.tokens) or found.tokens[n] != expected.tokens[n]]:
        first = other[0]
        seen = repr(found.tokens[first]) if first < len(found.tokens) else "not there"
        return [f"{len(other)} tokens are others, such as {first}: {seen}, and was {expected.tokens[first]!r}"]
    marked = (TokenType.CONTROL, TokenType.USER_DEFINED)
    lost = [n for n in real if wanted[n] in marked and (kinds[n] if n < len(kinds) else 1) not in marked]
    lost = [n for n in lost if expected.tokens[n] not in _ENDS]  # llama.cpp marks these by itself
    return [f"{expected.tokens[n]!r} would be read as plain text: it is not marked as special" for n in lost[:3]]


def _other_scores(found: Vocabulary, expected: Vocabulary) -> bool:
    """Whether two lists of scores cut a text differently: of joined pieces the order counts, of unigrams the values."""
    ours, theirs = expected.get("scores"), found.get("scores")
    if ours is None or theirs is None or len(theirs) < len(ours):
        return ours is not theirs
    if expected.get("model") == "t5":
        return any(not math.isclose(one, other, rel_tol=1e-5) for one, other in zip(ours, theirs, strict=False))
    lowest = min(ours, default=0.0)
    ranked = sorted((number for number, score in enumerate(ours) if score > lowest), key=lambda n: -ours[n])
    return any(theirs[later] > theirs[earlier] for earlier, later in itertools.pairwise(ranked))
