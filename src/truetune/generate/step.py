"""What a step does with its rows: the forward that some of them share, and the token that each of them gets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from truetune.generate.direct import DirectRunner
from truetune.generate.request import Delta, TokenLogprob
from truetune.generate.rows import Piece, Row
from truetune.generate.runner import PagedRunner, Runner, SingleRunner
from truetune.generate.sample import logprob
from truetune.models.paged import Pages, takes_pages


def fastest(model: Any, pages: int, *, direct: bool) -> Runner:
    """The fastest way that gives what the model gives.

    Args:
        pages: of keys and values that there are.
        direct: layers may be computed from their parts.
    """
    if not takes_pages(model):
        return SingleRunner(model)
    own = PagedRunner(model, Pages(pages))
    return (DirectRunner.of(own) if direct else None) or own


def groups(runner: Runner, pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Pieces that can share a forward: all with no adapter or one that goes row by row, and those of each other one.

    Within a group, rows of one adapter are neighbours.
    """
    if runner.pages is None:
        # Rows with a cache of their own are computed one by one anyway: alone, a failure is nobody else's.
        return [[piece] for piece in pieces]
    found: dict[str, list[Piece]] = {}
    for piece in sorted(pieces, key=lambda piece: piece.row.owner):
        adapter = piece.row.adapter
        together = "" if adapter is None or adapter.terms is not None else adapter.owner
        found.setdefault(together, []).append(piece)
    return list(found.values())


@torch.no_grad()
def forward(model: Any, runner: Runner, pieces: Sequence[Piece]) -> Tensor:
    """[w, vocab]: what follows each piece of one group that ends its row so far, in their order."""
    adapter = pieces[0].row.adapter
    if adapter is None or adapter.terms is not None:
        return runner.logits(pieces)
    with adapter.mounted(model):
        # What takes layers' places is computed by the model's own code.
        return (runner.own if isinstance(runner, DirectRunner) else runner).logits(pieces)


def advance(row: Row, logits: Tensor) -> Delta:
    """Give a row its next token, by logits [vocab]; returns what there is to say with it.

    Raises:
        ModelError: the logits are no numbers, or the row's grammar can't be followed.
    """
    request, guide = row.request, row.guide
    allowed = None if guide is None else guide.allowed(len(logits), request.stop_ids)
    token = row.draws.choose(logits, allowed)
    wanted = None if request.logprobs is None else (logprob(logits, token, request.logprobs),)
    row.ids.append(token)
    row.answered += 1
    if token in request.stop_ids:
        return _last(row, "", token, wanted, is_cut=False)
    if guide is not None:
        guide.took(token)
    text = row.text.push(token)
    if row.text.stopped:
        return Delta(text, (token,), wanted, "stop")
    if guide is not None and guide.is_whole:
        return _last(row, text, token, wanted, is_cut=False)
    if row.answered >= row.room:
        return _last(row, text, token, wanted, is_cut=True)
    return Delta(text, (token,), wanted)


def _last(row: Row, text: str, token: int, wanted: tuple[TokenLogprob, ...] | None, *, is_cut: bool) -> Delta:
    text += row.text.end()
    return Delta(text, (token,), wanted, "length" if is_cut and not row.text.stopped else "stop")
