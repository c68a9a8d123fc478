"""From conversations to tokens and a mask, by structure and never by searching strings.

For every answer that is trained, the template is rendered up to it (the very prompt that generation will send) and
with it. The answer's tokens are what the second has beyond the first, up to and including one stop token. So the prompt
that is trained on and the prompt that is served are one and the same list of ids, checked row by row.

What a template leaves out of a conversation (a system message, a tool, a call, an answer's reasoning) makes its row a
reject with the reason: nothing is dropped because a template happens to have no place for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from truetune.data.left_out import left_out
from truetune.data.schema import Message, Reject, Row, TokenSet
from truetune.data.template import Template, TextEncoder
from truetune.errors import TemplateError

TrainOn = Literal["assistant", "last", "all"]
Say = Callable[..., str]  # Template.render with all but the turns settled

# Rows tokenised at once: a tokenizer keeps a hundred bytes a token until its whole batch is handed over.
_BATCH = 1024


@dataclass(frozen=True)
class _Rendered:
    """One row as text, with the character spans that are trained; ``whole`` where they are no single answers."""

    row: Row
    text: str
    spans: tuple[tuple[int, int], ...]
    whole: bool = False


def encode_rows(
    rows: Sequence[Row],
    template: Template | None,
    encoder: TextEncoder,
    *,
    train_on: TrainOn,
    system: str | None = None,
    retold: Callable[[Row], Row] | None = None,
) -> tuple[TokenSet, list[Reject]]:
    """Tokenise rows and mark what is trained.

    Args:
        rows: conversations, or plain texts (which are trained as a whole, ended by the end token).
        template: needed as soon as one row is a conversation.
        system: put in front of conversations that have no system message.
        retold: what a text becomes before it is encoded, see ``data.fim``.
    Returns:
        The examples, and the rows that can't be rendered so that train and serve agree, with the reason.
    """
    rendered: list[_Rendered] = []
    rejects: list[Reject] = []
    stops = _written_stops(encoder) if any(row.messages for row in rows) else ()
    for row in map(retold, rows) if retold else rows:
        try:
            rendered.append(_render(row, template, encoder, train_on=train_on, system=system, stops=stops))
        except TemplateError as error:
            rejects.append(Reject(row.origin, "template", error.message))
    parts = []
    for start in range(0, len(rendered), _BATCH):
        examples, refused = _encode(rendered[start : start + _BATCH], encoder)
        parts.append(examples)
        rejects += refused
    return TokenSet.join(parts), rejects


def _encode(rendered: Sequence[_Rendered], encoder: TextEncoder) -> tuple[TokenSet, list[Reject]]:
    kept, ids, spans, rejects = [], [], [], []
    for item, encoded in zip(rendered, _tokenise(rendered, encoder), strict=True):
        problem = _mask_problem(item, encoded, encoder)
        if problem:
            rejects.append(Reject(item.row.origin, *problem))
        else:
            kept.append(item.row.origin)
            ids.append(encoded.tokens)
            spans.append(encoded.spans)
    return TokenSet.from_spans(ids, spans, kept), rejects


def _written_stops(encoder: TextEncoder) -> tuple[str, ...]:
    """Stop tokens that a tokenizer finds in plain text too: what contains one ends where nobody meant it to."""
    texts = [(number, encoder.decode([number]).strip()) for number in sorted(encoder.stop_ids)]
    return tuple(text for number, text in texts if len(text) > 2 and encoder.encode([text])[0] == [number])


def _render(
    row: Row, template: Template | None, encoder: TextEncoder, *, train_on: TrainOn, system: str | None,
    stops: Sequence[str],
) -> _Rendered:  # fmt: skip
    if not row.messages:
        text = encoder.bos_token + row.text + encoder.eos_token
        return _Rendered(row, text, ((len(encoder.bos_token), len(text)),))
    assert template is not None
    messages = row.messages
    if system is not None and messages[0].role != "system":
        messages = (Message("system", system), *messages)
    for turn, message in enumerate(messages, 1):
        if found := next((stop for stop in stops if stop in message.content or stop in message.reasoning), ""):
            raise TemplateError(
                f"turn {turn} ({message.role}) contains {found!r} written out, which the tokenizer takes for the end "
                "of a turn; take it off the text"
            )
    if row.tools and "tools" not in template.source:
        raise TemplateError(
            "the row brings tools, and the template has no place for them; --tools drop leaves them out"
        )
    say = functools.partial(template.render, encoder, tools=row.tools)
    opening = encoder.bos_token
    try:
        return _worded(row, messages, say, train_on=train_on, opening=opening)
    except TemplateError:
        if not any(message.tool_calls for message in messages):
            raise
        try:
            older = functools.partial(say, calls_as_text=True)
            return _worded(row, messages, older, train_on=train_on, opening=opening)
        except TemplateError:
            pass
        raise


def _worded(row: Row, messages: Sequence[Message], say: Say, *, train_on: TrainOn, opening: str) -> _Rendered:
    """The row's text and its trained spans, once nothing is left out and no prompt differs from the served one."""
    full = say(messages, prompt=False)
    if lost := next((name for tool in row.tools if (name := tool["function"]["name"]) not in full), ""):
        raise TemplateError(f"the template leaves out the tool '{lost}'; --tools drop leaves out all of them")
    for turn, message in enumerate(messages, 1):
        # Of an answer that is not trained, a template may well drop something: its reasoning, once it is past.
        if (message.role != "assistant" or train_on == "all") and (part := left_out(message, full)):
            raise TemplateError(f"the template leaves out a part of turn {turn} ({message.role}): {part}")
    answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
    if train_on == "all":
        start = len(opening) if full.startswith(opening) else 0
        context = [_answer(messages, i, full, say) for i in answers if not messages[i].train]
        return _Rendered(row, full, _without(context, start, len(full.rstrip())), whole=True)
    wanted = answers[-1:] if train_on == "last" else answers
    return _Rendered(row, full, tuple(_answer(messages, i, full, say) for i in wanted if messages[i].train))


def _answer(messages: Sequence[Message], index: int, full: str, say: Say) -> tuple[int, int]:
    """Where the answer in ``messages[index]`` stands in ``full``: behind the prompt that would be served for it."""
    before = say(messages[:index], prompt=True)
    upto = (full if index + 1 == len(messages) else say(messages[: index + 1], prompt=False)).rstrip()
    if not full.startswith(upto):
        raise TemplateError(
            f"the template words turn {index + 1} differently once more turns follow, so what is trained would not "
            "be what is served; --train-on last trains the last answer alone"
        )
    if not upto.startswith(before):
        raise TemplateError(
            f"the prompt that the template makes for the answer in turn {index + 1} is not how the text begins that "
            "would be trained (it opens its reasoning in another way, perhaps), so another prompt would be served"
        )
    if part := left_out(messages[index], upto[len(before) :]):
        raise TemplateError(
            f"the template leaves out a part of the answer in turn {index + 1} ({part}), so it would not be learned; "
            + (
                "--thinking drop trains without it"
                if part == "its reasoning"
                else "--template FILE with one that keeps it"
            )
        )
    return len(before), len(upto)


def _without(holes: Sequence[tuple[int, int]], start: int, end: int) -> tuple[tuple[int, int], ...]:
    """What is left of a span when some stretches in it are taken out."""
    edges = [start, *(edge for hole in holes for edge in hole), end]
    return tuple((a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b)


@dataclass(frozen=True)
class _Encoded:
    """One row as tokens, with the stretches that are trained, apart from each other and in their order.

    ``differs`` says which prompt in it is not the one that would be served.
    """

    tokens: list[int]
    spans: list[tuple[int, int]]
    differs: int | None  # counts the trained stretches, from 1


def _tokenise(items: Sequence[_Rendered], encoder: TextEncoder) -> list[_Encoded]:
    """Ids and trained stretches of each text.

    A text is encoded as a whole, and once more up to each border of a span: where the shorter ids are a prefix of the
    longer ones, their number is the border. Where a merge reaches across a border, the text is cut at all of them
    instead; behind a cut, a later prompt may then be worded in other tokens than it would be served in.
    """
    texts, borders = [], []
    for item in items:
        edges = sorted({edge for span in item.spans for edge in span} - {0, len(item.text)})
        borders.append(edges)
        texts += [item.text, *(item.text[:edge] for edge in edges)]
    encoded = iter(encoder.encode(texts))
    result = []
    for item, edges in zip(items, borders, strict=True):
        ids, prefixes = next(encoded), [next(encoded) for _ in edges]
        if any(ids[: len(prefix)] != prefix for prefix in prefixes):
            ids, counts = _cut(item.text, edges, encoder)
        else:
            counts = [len(prefix) for prefix in prefixes]
        position = {0: 0, **dict(zip(edges, counts, strict=True)), len(item.text): len(ids)}
        spans = _joined([(position[start], position[end]) for start, end in item.spans])
        served = {0: [], len(item.text): ids, **dict(zip(edges, prefixes, strict=True))}
        differs = (n for n, (start, _) in enumerate(item.spans, 1) if ids[: position[start]] != served[start])
        result.append(_Encoded(ids, spans, next(differs, None)))
    return result


def _joined(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Stretches that have a token, those that touch as one."""
    found: list[tuple[int, int]] = []
    for start, end in spans:
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        elif start < end:
            found.append((start, end))
    return found


def _cut(text: str, edges: Sequence[int], encoder: TextEncoder) -> tuple[list[int], list[int]]:
    """Encode the pieces between borders one by one: exactly what generation sees at each of them."""
    bounds = [0, *edges, len(text)]
    pieces = encoder.encode([text[a:b] for a, b in pairwise(bounds)])
    ids: list[int] = []
    counts = []
    for piece in pieces:
        ids += piece
        counts.append(len(ids))
    return ids, counts[:-1]


def _mask_problem(item: _Rendered, encoded: _Encoded, encoder: TextEncoder) -> tuple[str, str] | None:
    """Why an example must not be trained on: no trained token, another prompt than served, an answer without end."""
    tokens, spans = encoded.tokens, encoded.spans
    if encoder.bos_token and tokens[1:2] == tokens[:1] == encoder.encode([encoder.bos_token])[0]:
        return "double_bos", f"the text begins with {encoder.bos_token} twice: take one of them off the template"
    if not any(end > 1 for _, end in spans):  # the first token has no predecessor to be predicted from
        return "nothing_trained", "no token of this row carries a loss"
    if encoded.differs is not None:
        return "prompt_differs", (
            f"trained stretch {encoded.differs}: an answer before it begins or ends with characters that the tokenizer "
            "joins to the template's, so this prompt would be served in other tokens than it is trained in; --train-on "
            "last trains the last answer alone, or take such characters (a line break, mostly) off the answer"
        )
    ends = [end - 1 for _, end in spans]
    closing = ends[-1:] if item.whole else ends
    if item.row.messages and any(tokens[end] not in encoder.stop_ids for end in closing):
        last = encoder.decode([tokens[ends[-1]]])
        return "no_stop_token", f"the answer ends in {last!r}, and no stop token is trained; the template must add one"
    return None
