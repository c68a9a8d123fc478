"""From the characters that are trained to the tokens that are: where each border stands among a text's ids.

A text is encoded as a whole, and once more up to each border: where the shorter ids are how the longer ones begin,
their number is the border. Where a merge reaches across a border, the text is cut at all of them instead; behind a cut,
a later prompt may then be worded in other tokens than it would be served in.

That is each text twice or more. Behind a stop token, and at the start of most lines, most tokenizers begin anew. So
what follows a border is encoded alone, from shortly before it: from a *seam*. What two parts share must be the same ids
in both; that the parts are the whole is seen by encoding the whole too. With a tokenizer that cuts texts into words
before it looks for tokens (``TextEncoder.by_words``) the first is enough, and the second is done with some of a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

from truetune.data.template import TextEncoder

Span = tuple[int, int]

_WHOLE = 4  # borders up to which a text is not parted, where the whole has to be encoded anyway
_NEAR = 96  # characters before a border in which a line may begin
_JOINED = "/"  # what some tokenizers (o200k's pattern) take into the word that ends the line before
_EVERY = 64  # texts of which one is encoded as a whole too


@dataclass(frozen=True)
class Encoded:
    """One text as tokens, with the stretches that are trained, apart from each other and in their order.

    ``differs`` says which prompt in it is not the one that would be served.
    """

    tokens: list[int]
    spans: list[Span]
    differs: int | None  # counts the trained stretches, from 1


@dataclass(frozen=True)
class _Part:
    """A part of a text: its characters from ``opening`` on, with the borders in it and the one that ends it.

    It is encoded from ``start`` on, and shares what lies between the two with the part before it.
    """

    start: int
    edges: list[int]
    end: int
    opening: int = 0

    def texts(self, text: str) -> list[str]:
        """What is to be encoded: all of it, then up to each border."""
        return [text[self.start : self.end], *(text[self.start : edge] for edge in self.edges)]

    def shared(self, text: str) -> str:
        """What ends the part before it, too."""
        return text[self.start : self.opening]


_Own = list[tuple[_Part, list[list[int]]]]
"""Parts with the ids that are theirs alone: of all of it, then up to each border."""
_Seams = Mapping[str, list[int]]
"""What parts share, as ids."""


def tokenise(texts: Sequence[tuple[str, Sequence[Span]]], encoder: TextEncoder, stops: Sequence[str]) -> list[Encoded]:
    """Ids and trained stretches.

    Args:
        texts: each with the spans of its characters that are trained, ascending.
        stops: stop tokens that the tokenizer finds in any text, as they are written.
    """
    return _in_parts(texts, encoder, stops, by_words=encoder.by_words)


def _in_parts(
    texts: Sequence[tuple[str, Sequence[Span]]], encoder: TextEncoder, stops: Sequence[str], *, by_words: bool
) -> list[Encoded]:
    """``tokenise``, with seams at lines only if ``by_words``, and if the texts that are checked bear that out."""
    parted = [_parted(text, _edges(text, spans), stops, by_words=by_words) for text, spans in texts]
    checked = [len(parts) > 1 and (not by_words or _spot(number)) for number, parts in enumerate(parted)]
    shared = list({part.shared(text) for (text, _), parts in zip(texts, parted, strict=True) for part in parts[1:]})
    asked = list(shared)
    for (text, _), parts, check in zip(texts, parted, checked, strict=True):
        asked += [text] * check
        asked += chain.from_iterable(part.texts(text) for part in parts)
    encoded = iter(encoder.encode(asked))
    seams: _Seams = {"": []} | {text: next(encoded) for text in shared}
    result = []
    for (text, spans), parts, check in zip(texts, parted, checked, strict=True):
        whole = next(encoded) if check else None
        ids = [[next(encoded) for _ in range(len(part.edges) + 1)] for part in parts]
        own = _own(text, parts, ids, seams)
        if own and whole is not None and [token for _, found in own for token in found[0]] != whole:
            if by_words:  # then the texts that are not checked are not to be trusted either
                return _in_parts(texts, encoder, stops, by_words=False)
            own = None
        if own is None:
            parts = [_Part(0, _edges(text, spans), len(text))]
            own = [(parts[0], encoder.encode(parts[0].texts(text)))]
        result.append(_put_together(text, spans, own, encoder))
    return result


def _spot(number: int) -> bool:
    """Whether a text of a batch is one of those that are encoded as a whole too."""
    return number % _EVERY == 0


def _edges(text: str, spans: Sequence[Span]) -> list[int]:
    return sorted({edge for span in spans for edge in span} - {0, len(text)})


def _parted(text: str, edges: list[int], stops: Sequence[str], *, by_words: bool) -> list[_Part]:
    """The text in parts, each of which begins at a seam shortly before the end of the one before."""
    parts: list[_Part] = []
    start = opening = 0
    within: list[int] = []
    for edge in edges if by_words or len(edges) > _WHOLE else ():
        seam = _seam(text, opening, edge, stops, lines=by_words)
        if seam is None:
            within.append(edge)
            continue
        parts.append(_Part(start, within, edge, opening))
        start, opening, within = seam, edge, []
    return [*parts, _Part(start, within if parts else edges, len(text), opening)]


def _seam(text: str, opening: int, edge: int, stops: Sequence[str], *, lines: bool) -> int | None:
    """Where a stop token begins that ends at the border, or else the line in which the border stands."""
    if stop := next((stop for stop in stops if text.endswith(stop, opening, edge)), ""):
        return edge - len(stop)
    start = text.rfind("\n", max(opening, edge - _NEAR), edge - 1) + 1 if lines else 0
    return start if start and not text[start].isspace() and text[start] not in _JOINED else None


def _own(text: str, parts: Iterable[_Part], encoded: Iterable[list[list[int]]], seams: _Seams) -> _Own | None:
    """What is left of each part's ids without what it shares; None where two parts differ in that."""
    own: _Own = []
    before: list[int] = []
    for part, ids in zip(parts, encoded, strict=True):
        shared = seams[part.shared(text)]
        count = len(shared)
        if count and (before[-count:] != shared or any(found[:count] != shared for found in ids)):
            return None
        own.append((part, [found[count:] for found in ids] if count else ids))
        before = ids[0]
    return own


def _put_together(text: str, spans: Sequence[Span], own: _Own, encoder: TextEncoder) -> Encoded:
    merged = any(whole[: len(prefix)] != prefix for _, (whole, *prefixes) in own for prefix in prefixes)
    place, unlike, tokens = {0: 0}, set[int](), list[int]()
    for part, (whole, *prefixes) in own:
        as_served = [*prefixes, whole]
        pieces = _cut(text, part, encoder) if merged else []
        as_trained = [list(chain.from_iterable(pieces[: n + 1])) for n in range(len(pieces))] or as_served
        for edge, one, other in zip((*part.edges, part.end), as_served, as_trained, strict=True):
            place[edge] = len(tokens) + len(other)
            if merged and (one != other or part.opening in unlike):
                unlike.add(edge)
        tokens += as_trained[-1]
    differs = next((number for number, (start, _) in enumerate(spans, 1) if start in unlike), None)
    return Encoded(tokens, _joined([(place[start], place[end]) for start, end in spans]), differs)


def _cut(text: str, part: _Part, encoder: TextEncoder) -> list[list[int]]:
    """The ids of the pieces between borders, each alone: exactly what generation sees at each of them."""
    return encoder.encode([text[a:b] for a, b in pairwise([part.opening, *part.edges, part.end])])


def _joined(spans: Sequence[Span]) -> list[Span]:
    """Stretches that have a token, those that touch as one."""
    found: list[Span] = []
    for start, end in spans:
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        elif start < end:
            found.append((start, end))
    return found
