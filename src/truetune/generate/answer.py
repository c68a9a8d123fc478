"""Greedy answers by transformers' own generation: what the engine, merged models and servers are compared with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from truetune.adapters.virtual import virtual_ids


@torch.no_grad()
def answer_all(
    model: Any, prompts: Sequence[Sequence[int]], *, stop_ids: frozenset[int], longest: int
) -> list[list[int]]:
    """The likeliest tokens after each of ``prompts``, all in one batch.

    Args:
        longest: tokens of an answer.
    Returns:
        The new ids of each, its stop token included when one came.
    """
    own = virtual_ids(model)
    prompts = [[*own, *prompt] for prompt in prompts]
    width = max(map(len, prompts))
    pad = min(stop_ids, default=0)
    # Padding goes to the left: every answer then starts in the same column.
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    with _no_settings_of_its_own(model):
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=longest, do_sample=False,
            eos_token_id=sorted(stop_ids) or None, pad_token_id=pad,
        )  # fmt: skip
    return [_until_stop(row, stop_ids) for row in out[:, width:].tolist()]


@contextlib.contextmanager
def _no_settings_of_its_own(model: Any) -> Iterator[None]:
    """Lay aside what the model's ``generation_config.json`` says: the library would mix a repetition penalty or a
    top-k of its own into what was asked for. Its stop tokens are among ``stop_ids`` already."""
    before = model.generation_config
    model.generation_config = type(before)()
    try:
        yield
    finally:
        model.generation_config = before


def _until_stop(ids: list[int], stop_ids: frozenset[int]) -> list[int]:
    """Cut the padding after the first stop token."""
    end = next((i for i, token in enumerate(ids) if token in stop_ids), len(ids))
    return ids[: end + 1]
