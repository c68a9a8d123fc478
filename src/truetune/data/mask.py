"""From conversations to tokens and a mask, by structure and never by searching strings.

For every answer that is trained, the template is rendered up to it (the very prompt that generation will send) and
with it. The answer's tokens are what the second has beyond the first, up to and including one stop token. So the prompt
that is trained on and the prompt that is served are one and the same list of ids, checked row by row.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from truetune.data.schema import Message, Reject, Row, TokenSet
from truetune.data.template import Template, TextEncoder
from truetune.errors import TemplateError

TrainOn = Literal["assistant", "last", "all"]

# Rows tokenised at once: a tokenizer keeps a hundred bytes a token until its whole batch is handed over.
_BATCH = 1024


@dataclass(frozen=True)
class _Rendered:
    """One row as text, with the character spans that are trained."""

    row: Row
    text: str
    spans: tuple[tuple[int, int], ...]


def encode_rows(
    rows: Sequence[Row],
    template: Template | None,
    encoder: TextEncoder,
    *,
    train_on: TrainOn,
    system: str | None = None,
) -> tuple[TokenSet, list[Reject]]:
    """Tokenise rows and mark what is trained.

    Args:
        rows: conversations, or plain texts (which are trained as a whole, ended by the end token).
        template: needed as soon as one row is a conversation.
        system: put in front of conversations that have no system message.
    Returns:
        The examples, and the rows that can't be rendered so that train and serve agree, with the reason.
    """
    rendered: list[_Rendered] = []
    rejects: list[Reject] = []
    for row in rows:
        try:
            rendered.append(_render(row, template, encoder, train_on=train_on, system=system))
        except TemplateError as error:
            rejects.append(Reject(row.origin, "template", error.message))
    parts = []
    for start in range(0, len(rendered), _BATCH):
        examples, refused = _encode(rendered[start : start + _BATCH], encoder)
        parts.append(examples)
        rejects += refused
    return TokenSet.join(parts), rejects


def _encode(rendered: Sequence[_Rendered], encoder: TextEncoder) -> tuple[TokenSet, list[Reject]]:
    kept, ids, flags, rejects = [], [], [], []
    for item, encoded in zip(rendered, _tokenise(rendered, encoder), strict=True):
        problem = _mask_problem(item, encoded, encoder)
        if problem:
            rejects.append(Reject(item.row.origin, *problem))
        else:
            kept.append(item.row.origin)
            ids.append(encoded.tokens)
            flags.append(encoded.trained)
    return TokenSet.from_lists(ids, flags, kept), rejects


def _render(
    row: Row, template: Template | None, encoder: TextEncoder, *, train_on: TrainOn, system: str | None
) -> _Rendered:
    if not row.messages:
        text = encoder.bos_token + row.text + encoder.eos_token
        return _Rendered(row, text, ((len(encoder.bos_token), len(text)),))
    assert template is not None
    messages = row.messages
    if system is not None and messages[0].role != "system":
        messages = (Message("system", system), *messages)
    if row.tools and "tools" not in template.source:
        raise TemplateError("the row brings tools, and the template has no place for them")
    full = template.render(encoder, messages, tools=row.tools, prompt=False)
    for turn, message in enumerate(messages, 1):
        # Of an answer that is not trained, a template may well drop something: its reasoning, once it is past.
        if (message.role != "assistant" or train_on == "all") and _left_out(message, full):
            raise TemplateError(f"the template leaves out a part of turn {turn} ({message.role})")
    if train_on == "all":
        opening = len(encoder.bos_token) if full.startswith(encoder.bos_token) else 0
        return _Rendered(row, full, ((opening, len(full.rstrip())),))
    answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
    spans = []
    for index in answers[-1:] if train_on == "last" else answers:
        before = template.render(encoder, messages[:index], tools=row.tools, prompt=True)
        answered = messages[: index + 1]
        upto = full if answered == messages else template.render(encoder, answered, tools=row.tools, prompt=False)
        upto = upto.rstrip()
        if not (full.startswith(upto) and upto.startswith(before)):
            raise TemplateError(
                f"the template words turn {index + 1} differently once more turns follow, so what is trained would not "
                "be what is served; --train-on last trains the last answer alone"
            )
        if _left_out(messages[index], upto[len(before) :]):
            raise TemplateError(
                f"the template leaves out a part of the answer in turn {index + 1} (its reasoning, perhaps), so it "
                "would not be learned; --template FILE with one that keeps it"
            )
        spans.append((len(before), len(upto)))
    return _Rendered(row, full, tuple(spans))


def _left_out(message: Message, text: str) -> bool:
    """Whether a template dropped words of a message; blanks and line breaks are its own affair."""
    bare = "".join(text.split())
    parts = [message.content] if message.instruction is None else [message.instruction, message.input or ""]
    missing = any("".join(part.split()) not in bare for part in parts)
    if missing and message.role == "tool":  # what a tool returned may stand there as a JSON string
        quoted = (json.dumps(message.content, ensure_ascii=ascii_only) for ascii_only in (True, False))
        return all("".join(text.split()) not in bare for text in quoted)
    return missing


@dataclass(frozen=True)
class _Encoded:
    """One row as tokens; ``differs`` says which prompt in it is not the one that would be served."""

    tokens: list[int]
    trained: list[bool]
    differs: int | None  # counts the trained stretches, from 1


def _tokenise(items: Sequence[_Rendered], encoder: TextEncoder) -> list[_Encoded]:
    """Ids and flags of each text.

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
        flags = [False] * len(ids)
        for start, end in item.spans:
            flags[position[start] : position[end]] = [True] * (position[end] - position[start])
        served = {0: [], len(item.text): ids, **dict(zip(edges, prefixes, strict=True))}
        differs = (n for n, (start, _) in enumerate(item.spans, 1) if ids[: position[start]] != served[start])
        result.append(_Encoded(ids, flags, next(differs, None)))
    return result


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
    tokens, trained = encoded.tokens, encoded.trained
    if not any(trained[1:]):  # the first token has no predecessor to be predicted from
        return "nothing_trained", "no token of this row carries a loss"
    if encoded.differs is not None:
        return "prompt_differs", (
            f"trained stretch {encoded.differs}: an answer before it begins or ends with characters that the tokenizer "
            "joins to the template's, so this prompt would be served in other tokens than it is trained in; --train-on "
            "last trains the last answer alone, or take such characters (a line break, mostly) off the answer"
        )
    ends = [i for i, flag in enumerate(trained) if flag and (i + 1 == len(trained) or not trained[i + 1])]
    if item.row.messages and any(tokens[end] not in encoder.stop_ids for end in ends):
        last = encoder.decode([tokens[ends[-1]]])
        return "no_stop_token", f"the answer ends in {last!r}, and no stop token is trained; the template must add one"
    return None
