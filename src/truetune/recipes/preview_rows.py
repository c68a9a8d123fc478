"""Which rows a preview shows, and each of them token by token: what the loss sees, as a person can read it."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

from truetune.data.schema import Origin, Reject
from truetune.data.statistics import trained_per_row
from truetune.data.token_set import TokenSet
from truetune.models.tokenizer import ChatTokenizer
from truetune.recipes.data import Prepared
from truetune.recipes.quality import spread

_LONGEST_CHARACTER = 4  # bytes, and so tokens at most
_JOINERS = "\u200c\u200d\ufe0e\ufe0f"  # invisible, and part of how words and emoji are written


@dataclass(frozen=True)
class Piece:
    """One token; or the few that spell one character between them."""

    text: str
    ids: tuple[int, ...]
    trained: bool
    kind: str  # "text", "special", or "stop": a special token that ends an answer


@dataclass(frozen=True)
class Shown:
    """One row: an example with its tokens, or a row that is left out, with the reason."""

    origin: Origin
    part: str  # "train", "held_out" or "rejected"
    why: str = ""  # it is shown
    length: int = 0
    trained: int = 0
    pieces: Sequence[Piece] = ()
    reject: Reject | None = None


@dataclass(frozen=True)
class Gallery:
    """All rows of a data set, by number: trained on, held out, left out."""

    prepared: Prepared
    tokenizer: ChatTokenizer

    @cached_property
    def sets(self) -> list[tuple[str, TokenSet]]:
        """The tokenised parts, by name."""
        held_out = self.prepared.held_out
        return [("train", self.prepared.train), *([("held_out", held_out)] if held_out else [])]

    def __len__(self) -> int:
        return sum(len(examples) for _, examples in self.sets) + len(self.prepared.rejects)

    def show(self, number: int, why: str = "") -> Shown:
        """Row ``number``, counted from 0 through the parts."""
        for part, examples in self.sets:
            if number < len(examples):
                ids, flags = (column.tolist() for column in examples.example(number))
                pieces = list(pieces_of(ids, flags, self.tokenizer))
                return Shown(examples.origins[number], part, why, len(ids), sum(flags[1:]), pieces)
            number -= len(examples)
        reject = self.prepared.rejects[number]
        return Shown(reject.origin, "rejected", why, reject=reject)

    def origins(self) -> Iterator[Origin]:
        """Of all rows, by number."""
        for _, examples in self.sets:
            yield from examples.origins
        yield from (reject.origin for reject in self.prepared.rejects)

    def named(self, spans: Sequence[tuple[int, int]]) -> list[int]:
        """The rows whose number in their file lies in one of ``spans``, in the order of files and rows."""
        found = [
            (origin.file, origin.row, number)
            for number, origin in enumerate(self.origins())
            if any(first <= origin.row <= last for first, last in spans)
        ]
        return [number for *_, number in sorted(found)]

    def sample(self, count: int) -> list[int]:
        """``count`` rows, evenly over all."""
        return spread(range(len(self)), count)

    def worst(self) -> dict[int, str]:
        """The rows to look at first, with why: number → reason."""
        found: dict[int, str] = {}

        def add(number: int, why: str) -> None:
            found[number] = f"{found[number]}, {why}" if number in found else why

        first = len(self) - len(self.prepared.rejects)
        for reason in self.prepared.report["rejected"]:
            of_it = (i for i, reject in enumerate(self.prepared.rejects) if reject.reason == reason)
            for number in islice(of_it, 2):
                add(first + number, "left out")
        before = 0
        for _, examples in self.sets:
            trained = trained_per_row(examples)
            add(before + int(examples.lengths.argmax()), "longest")
            for number in trained.argsort(stable=True)[:2].tolist():
                add(before + number, "shortest answer")
            add(before + int((trained / examples.lengths).argmin()), "least of it trained")
            before += len(examples)
        pairs = self.prepared.report["repeats"]["rows"]
        alike = {row: f"nearly {other}" for row, other, _ in [*pairs["near"][:2], *pairs["near_leaked"][:2]]}
        for number, origin in enumerate(self.origins() if alike else ()):
            if str(origin) in alike:
                add(number, alike[str(origin)])
        return found


def pieces_of(ids: Sequence[int], flags: Sequence[bool], tokenizer: ChatTokenizer) -> Iterator[Piece]:
    """The tokens of one example as text.

    A token alone may be half a character, or drop the blank before its word: so each is what the text gains by it,
    read behind the token before it.
    """
    special, stops = tokenizer.special_ids, tokenizer.stop_ids
    context = start = 0  # what is decoded along, and where the piece begins
    for i, token in enumerate(ids):
        learned = bool(flags[i]) and i > 0  # the first token has no predecessor to be predicted from
        if token in special:
            # Some models take their start token for a stop as well; where a text begins, nothing ends.
            kind = "stop" if token in stops and i else "special"
            yield Piece(tokenizer.decode([token]), (token,), learned, kind)
            context = start = i + 1
            continue
        last = i + 1 == len(ids) or flags[i + 1] != flags[i] or ids[i + 1] in special
        whole = tokenizer.decode(ids[context : i + 1])
        if whole.endswith("\ufffd") and not last and i + 1 - start < _LONGEST_CHARACTER:
            continue
        before = tokenizer.decode(ids[context:start]) if start > context else ""
        yield Piece(whole.removeprefix(before), tuple(ids[start : i + 1]), learned, "text")
        context, start = start, i + 1


def visible(text: str) -> str:
    """``text`` with what can't be seen, or would steer a terminal, made visible; line breaks keep breaking."""
    if text.isprintable():
        return text
    return "".join(map(_visible, text))


def _visible(character: str) -> str:
    if character == "\n":
        return "↵\n"
    if character == "\t":
        return "→\t"
    if character < " ":
        return chr(0x2400 + ord(character))  # Unicode's pictures of them
    if character.isprintable() or character in _JOINERS or unicodedata.category(character) == "Zs":
        return character
    return f"⟨U+{ord(character):04X}⟩"
