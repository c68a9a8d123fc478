"""One answer, token by token, through transformers' own generation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from truetune.adapters.virtual import virtual_ids


class Decoder(Protocol):
    """What turns ids into text."""

    hf: Any


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: the likeliest at temperature 0, else drawn with ``seed``."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


class _Streamer:
    """Hands text on as soon as it is certain: a token may be half a character, or half a space."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None]) -> None:
        self.tokenizer, self.show = tokenizer, show
        self.ids: list[int] = []
        self.shown = 0
        self.skip_prompt = True

    def put(self, value: Tensor) -> None:
        if self.skip_prompt:
            self.skip_prompt = False
            return
        self.ids += value.flatten().tolist()
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if not text.endswith("\ufffd"):
            self.show(text[self.shown :])
            self.shown = len(text)

    def end(self) -> None:
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        self.show(text[self.shown :])


def answer(
    model: Any,
    tokenizer: Decoder,
    prompt: Sequence[int],
    *,
    stop_ids: frozenset[int],
    sampling: Sampling,
    show: Callable[[str], None] | None = None,
) -> list[int]:
    """Generate after ``prompt``.

    Returns:
        The new ids, the stop token included when one came.
    """
    streamer = _Streamer(tokenizer.hf, show) if show else None
    return _generate(model, [prompt], stop_ids=stop_ids, sampling=sampling, streamer=streamer)[0]


def answer_all(
    model: Any, prompts: Sequence[Sequence[int]], *, stop_ids: frozenset[int], sampling: Sampling
) -> list[list[int]]:
    """Generate after each of ``prompts`` in one batch; the new ids of each, its stop token included when one came."""
    return _generate(model, prompts, stop_ids=stop_ids, sampling=sampling, streamer=None)


@torch.no_grad()
def _generate(
    model: Any, prompts: Sequence[Sequence[int]], *, stop_ids: frozenset[int], sampling: Sampling, streamer: Any
) -> list[list[int]]:
    torch.manual_seed(sampling.seed)
    own = virtual_ids(model)
    prompts = [[*own, *prompt] for prompt in prompts]
    width = max(map(len, prompts))
    pad = min(stop_ids, default=0)
    # Padding goes to the left: every answer then starts in the same column.
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    draw = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0} if sampling.temperature else {}
    with _no_settings_of_its_own(model):
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=sampling.max_new_tokens,
            do_sample=sampling.temperature > 0,
            eos_token_id=sorted(stop_ids) or None,
            pad_token_id=pad,
            streamer=streamer,
            **draw,
        )
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
