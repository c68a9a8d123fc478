"""One answer, token by token, through transformers' own generation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


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


@torch.no_grad()
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
    torch.manual_seed(sampling.seed)
    ids = torch.tensor([list(prompt)], device=model.device)
    pad = next(iter(sorted(stop_ids)), 0)
    draw = {"temperature": sampling.temperature, "top_p": sampling.top_p} if sampling.temperature else {}
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=sampling.max_new_tokens,
        do_sample=sampling.temperature > 0,
        eos_token_id=sorted(stop_ids) or None,
        pad_token_id=pad,
        streamer=_Streamer(tokenizer.hf, show) if show else None,
        **draw,
    )
    new: list[int] = out[0, ids.shape[1] :].tolist()
    return new
