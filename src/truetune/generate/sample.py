"""Which token comes next: a function of the logits, the request and the place in its answer, of no other row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from truetune.errors import ModelError
from truetune.generate.request import Sampling, TokenLogprob
from truetune.ops.rng import derive_seed

NOT_FINITE = "the model's logits are not finite"


class Draws:
    """The choices of one request.

    Args:
        prompt: its ids, for the repetition penalty.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        self.sampling = sampling
        self._prompt = frozenset(prompt) if sampling.repetition_penalty != 1.0 else frozenset()
        self._answer: Counter[int] = Counter()
        self.place = 0

    def choose(self, logits: Tensor, allowed: Tensor | None = None) -> int:
        """The next token, by logits [vocab] in any floating dtype; a NaN anywhere is an error.

        Args:
            allowed: [vocab] bool, the tokens that it may be; None for all.
        Raises:
            ModelError: the logits hold no finite number to choose by.
        """
        sampling = self.sampling
        if sampling.changes_logits:
            logits = self.penalised(logits.float())
        if allowed is not None:
            logits = logits.masked_fill(~allowed.to(logits.device), float("-inf"))
        if not sampling.temperature:
            token = int(logits.argmax())
            if not bool(torch.isfinite(logits[token])):
                raise ModelError(NOT_FINITE)
        else:
            token = draw(logits.float(), sampling, uniform(sampling.seed, self.place))
        self.took(token)
        return token

    def took(self, token: int) -> None:
        """Count a token as part of the answer."""
        self.place += 1
        if self.sampling.changes_logits:
            self._answer[token] += 1

    def penalised(self, logits: Tensor) -> Tensor:
        """Logits [vocab] float32 with the penalties of ``Sampling``, a new tensor."""
        logits, sampling = logits.clone(), self.sampling
        if sampling.repetition_penalty != 1.0:
            seen = torch.tensor(sorted(self._prompt | self._answer.keys()), device=logits.device)
            seen = seen[seen < len(logits)]  # an adapter's virtual tokens have no logits
            values = logits[seen]
            by = sampling.repetition_penalty
            logits[seen] = torch.where(values > 0, values / by, values * by)
        if self._answer and (sampling.presence_penalty or sampling.frequency_penalty):
            ids = torch.tensor(list(self._answer), device=logits.device)
            counts = torch.tensor(list(self._answer.values()), device=logits.device, dtype=logits.dtype)
            logits[ids] -= sampling.presence_penalty + sampling.frequency_penalty * counts
        return logits


def uniform(seed: int, place: int) -> float:
    """A number in [0, 1) for one place of one answer."""
    return (derive_seed(seed, "draw", place) >> 10) / (1 << 53)


def draw(logits: Tensor, sampling: Sampling, at: float) -> int:
    """The token at ``at`` of the cumulated probabilities of those that may be drawn, likeliest first.

    The cuts come in the order top-k, top-p, min-p, each on what the one before left, as in transformers.

    Args:
        logits: [vocab] float32.
        at: in [0, 1).
    Raises:
        ModelError: the logits are not finite.
    """
    scaled = (logits / max(sampling.temperature, 1e-5)).double()
    count = min(sampling.top_k or len(scaled), len(scaled))
    values, ids = scaled.sort(descending=True, stable=True) if count == len(scaled) else scaled.topk(count)
    shares = values.softmax(0)
    if not bool(torch.isfinite(shares).all()):
        raise ModelError(NOT_FINITE)
    if sampling.top_p < 1:
        before = shares.cumsum(0) - shares
        count = int((before < sampling.top_p).sum().clamp_min(1))
    if sampling.min_p:
        count = min(count, int((shares[:count] >= sampling.min_p * shares[0]).sum().clamp_min(1)))
    up_to = shares[:count].cumsum(0)
    return int(ids[int(torch.searchsorted(up_to, at * float(up_to[-1]), right=True).clamp_max(count - 1))])


def logprob(logits: Tensor, token: int, count: int) -> TokenLogprob:
    """The logarithms of the probabilities of a token and of the ``count`` likeliest ones, by logits [vocab]."""
    scores = logits.float().log_softmax(0)
    values, ids = scores.topk(min(count, len(scores)))
    return TokenLogprob(token, float(scores[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))
