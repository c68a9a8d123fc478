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
from typing import Literal

from truetune.data.answers import Say, answer_spans
from truetune.data.borders import Encoded, tokenise
from truetune.data.left_out import Text, left_out
from truetune.data.schema import Message, Reject, Row
from truetune.data.template import Template, TextEncoder
from truetune.data.token_set import TokenSet
from truetune.errors import TemplateError

TrainOn = Literal["assistant", "last", "all"]

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
        examples, refused = _encode(rendered[start : start + _BATCH], encoder, stops)
        parts.append(examples)
        rejects += refused
    return TokenSet.join(parts), rejects


def _encode(rendered: Sequence[_Rendered], encoder: TextEncoder, stops: Sequence[str]) -> tuple[TokenSet, list[Reject]]:
    kept, ids, spans, rejects = [], [], [], []
    texts = [(item.text, item.spans) for item in rendered]
    for item, encoded in zip(rendered, tokenise(texts, encoder, stops), strict=True):
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
    found = (text for number, text in texts if len(text) > 2 and encoder.encode([text])[0] == [number])
    return tuple(sorted(found, key=len, reverse=True))  # of two that end a text, the longer one is meant


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
    text = Text(full)
    for turn, message in enumerate(messages, 1):
        # Of an answer that is not trained, a template may well drop something: its reasoning, once it is past.
        if (message.role != "assistant" or train_on == "all") and (part := left_out(message, text)):
            raise TemplateError(f"the template leaves out a part of turn {turn} ({message.role}): {part}")
    answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
    if train_on == "all":
        start = len(opening) if full.startswith(opening) else 0
        context = [i for i in answers if not messages[i].train]
        holes = answer_spans(messages, context, full, say)
        return _Rendered(row, full, _without(holes, start, len(full.rstrip())), whole=True)
    wanted = answers[-1:] if train_on == "last" else answers
    return _Rendered(row, full, answer_spans(messages, [i for i in wanted if messages[i].train], full, say))


def _without(holes: Sequence[tuple[int, int]], start: int, end: int) -> tuple[tuple[int, int], ...]:
    """What is left of a span when some stretches in it are taken out."""
    edges = [start, *(edge for hole in holes for edge in hole), end]
    return tuple((a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b)


def _mask_problem(item: _Rendered, encoded: Encoded, encoder: TextEncoder) -> tuple[str, str] | None:
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
