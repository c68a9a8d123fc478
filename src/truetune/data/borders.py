"""From the characters that are trained to the tokens that are: where each border stands among a text's ids.

A text is encoded as a whole, and once more up to each border: where the shorter ids are how the longer ones begin,
their number is the border. Where a merge reaches across a border, the text is cut at all of them instead; behind a cut,
a later prompt may then be worded in other tokens than it would be served in.

Behind a stop token a tokenizer begins anew. So of a text with many borders, what follows a stop token is encoded alone,
behind that token, and what is left to encode up to each border is short. That the parts are the whole is seen by
encoding the whole too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

from truetune.data.template import TextEncoder

Span = tuple[int, int]

_WHOLE = 4  # borders up to which a text is not parted


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
    """A part of a text: the characters from ``start``, with the borders in it and the one that ends it.

    ``shared`` tokens at its start end the part before it, up to the character ``opening``.
    """

    start: int
    edges: list[int]
    end: int
    opening: int = 0
    shared: int = 0

    def texts(self, text: str) -> list[str]:
        """What is to be encoded: all of it, then up to each border."""
        return [text[self.start : self.end], *(text[self.start : edge] for edge in self.edges)]


def tokenise(texts: Sequence[tuple[str, Sequence[Span]]], encoder: TextEncoder, stops: Sequence[str]) -> list[Encoded]:
    """Ids and trained stretches.

    Args:
        texts: each with the spans of its characters that are trained, ascending.
        stops: stop tokens that the tokenizer finds in any text, as they are written.
    """
    parted = [_parted(text, _edges(text, spans), stops) for text, spans in texts]
    asked: list[str] = []
    for (text, _), parts in zip(texts, parted, strict=True):
        asked += [text] * (len(parts) > 1)
        asked += chain.from_iterable(part.texts(text) for part in parts)
    encoded = iter(encoder.encode(asked))
    result = []
    for (text, spans), parts in zip(texts, parted, strict=True):
        whole = next(encoded) if len(parts) > 1 else None
        ids = [[next(encoded) for _ in range(len(part.edges) + 1)] for part in parts]
        if whole is not None and list(chain.from_iterable(_own(parts, ids))) != whole:
            parts = [_Part(0, _edges(text, spans), len(text))]
            ids = [encoder.encode(parts[0].texts(text))]
        result.append(_put_together(text, spans, parts, ids, encoder))
    return result


def _edges(text: str, spans: Sequence[Span]) -> list[int]:
    return sorted({edge for span in spans for edge in span} - {0, len(text)})


def _parted(text: str, edges: list[int], stops: Sequence[str]) -> list[_Part]:
    """The text in parts that each begin with the stop token of the one before."""
    parts: list[_Part] = []
    start = opening = shared = 0
    within: list[int] = []
    for edge in edges if len(edges) > _WHOLE else ():
        stop = next((stop for stop in stops if text.endswith(stop, opening, edge)), "")
        if not stop:
            within.append(edge)
            continue
        parts.append(_Part(start, within, edge, opening, shared))
        start, opening, shared, within = edge - len(stop), edge, 1, []
    return [*parts, _Part(start, within if parts else edges, len(text), opening, shared)]


def _own(parts: Sequence[_Part], ids: Sequence[Sequence[list[int]]]) -> Iterator[list[int]]:
    """The ids of each part that are not the end of the one before."""
    return (found[0][part.shared :] for part, found in zip(parts, ids, strict=True))


def _put_together(
    text: str, spans: Sequence[Span], parts: Sequence[_Part], ids: Sequence[Sequence[list[int]]], encoder: TextEncoder
) -> Encoded:
    """One text of its parts: ``ids`` are those of each part, then of each part up to each of its borders."""
    merged = any(whole[: len(prefix)] != prefix for whole, *prefixes in ids for prefix in prefixes)
    if len(parts) == 1 and not merged:  # nearly every row
        (only,), ((whole, *prefixes),) = parts, ids
        place = {0: 0, only.end: len(whole)} | dict(zip(only.edges, map(len, prefixes), strict=True))
        return Encoded(whole, _joined([(place[start], place[end]) for start, end in spans]), None)
    place, unlike, tokens = {0: 0}, set[int](), list[int]()
    for part, (whole, *prefixes) in zip(parts, ids, strict=True):
        as_served = [prefix[part.shared :] for prefix in (*prefixes, whole)]
        pieces = _cut(text, part, encoder) if merged else []
        as_trained = [list(chain.from_iterable(pieces[: n + 1])) for n in range(len(pieces))] or as_served
        for edge, one, other in zip((*part.edges, part.end), as_served, as_trained, strict=True):
            place[edge] = len(tokens) + len(other)
            if one != other or part.opening in unlike:
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
