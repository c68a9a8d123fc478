"""What is asked of the engine, and what comes back: a request, its stream of pieces, and the handle to both."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from typing_extensions import Self

from truetune.errors import ConfigError

if TYPE_CHECKING:
    from truetune.generate.grammar import Grammar
    from truetune.generate.loaded import Stamp

Finish = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen: the likeliest at temperature 0, else drawn.

    Attributes:
        temperature: logits are divided by it.
        top_p: draw among the likeliest tokens that make up this share.
        top_k: draw among so many; 0 for all.
        min_p: and among those at least so likely, as a share of the likeliest.
        repetition_penalty: logits of tokens that the text has, prompt included, are divided by it where positive and
            multiplied where negative (Keskar et al. 2019, arXiv:1909.05858, section 4.1).
        presence_penalty: subtracted from the logits of tokens that the answer has.
        frequency_penalty: the same, once for each time the answer has it.
        seed: of the draws. A draw is a function of this seed and of its place in the answer, and of nothing else.

    Raises:
        ConfigError: on construction, a value out of its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        finite = float("inf")
        for name, good, expected in (
            ("temperature", 0 <= self.temperature < finite, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("min_p", 0 <= self.min_p <= 1, "0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < finite, "above 0"),
            ("presence_penalty", abs(self.presence_penalty) < finite, "a finite number"),
            ("frequency_penalty", abs(self.frequency_penalty) < finite, "a finite number"),
        ):
            if not good:
                raise ConfigError(f"{name}: found {getattr(self, name)!r}", ("expected", expected))

    @property
    def changes_logits(self) -> bool:
        """Whether a penalty is set."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


@dataclass(frozen=True)
class Request:
    """One answer that is wanted.

    Attributes:
        prompt_ids: what it follows; at least one id.
        adapter: the name of a registered adapter; None for the base.
        max_new_tokens: the longest answer.
        stop: texts that end the answer; none of them is part of it.
        stop_ids: tokens that end it.
        logprobs: natural logarithms of the chosen tokens' probabilities are wanted, and those of so many likeliest.
        grammar: the answer is a text of it, unless it is cut; None for any text.
        stamp: of the adapter that the prompt was worded for; None for whichever is there.
    """

    prompt_ids: Sequence[int]
    adapter: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int = 256
    stop: Sequence[str] = ()
    stop_ids: frozenset[int] = frozenset()
    logprobs: int | None = None
    grammar: Grammar | None = None
    stamp: Stamp | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """A chosen token, and how likely it was by the model alone: before temperature, penalties, cuts and grammars.

    Attributes:
        top: the likeliest tokens, ``(id, logprob)`` each, best first.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Delta:
    """A piece of an answer.

    Attributes:
        text: what follows the text so far. It may be empty: a token can be part of a character, or of a stop text.
        ids: the new tokens, the one that ended the answer included.
        logprobs: one for each of ``ids`` where they were asked for.
        finish: set in the last piece, and only there. ``stop``: a stop text or token, or a grammar's end;
            ``length``: ``max_new_tokens``, or the end of the model's context.
        error: what went wrong, where ``finish`` is ``error``.
    """

    text: str = ""
    ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish: Finish | None = None
    error: str | None = None


class Handle:
    """The answer to one request as it comes: an iterator of its pieces, the last of which has a ``finish``.

    Args:
        cancel: called when the answer is no longer wanted.
        on_delta: called with each piece, from the engine's thread, instead of queueing it.
    """

    def __init__(self, cancel: Callable[[Handle], None], on_delta: Callable[[Delta], None] | None = None) -> None:
        self._queue: queue.SimpleQueue[Delta] = queue.SimpleQueue()
        self._cancel, self._on_delta = cancel, on_delta
        self._ended = False

    def cancel(self) -> None:
        """Stop the answer: its last piece is ``cancelled``, unless it had ended. From any thread."""
        self._cancel(self)

    def __iter__(self) -> Iterator[Delta]:
        return self

    def __next__(self) -> Delta:
        """The next piece; waits for it."""
        if self._ended:
            raise StopIteration
        delta = self._queue.get()
        self._ended = delta.finish is not None
        return delta

    def result(self) -> Delta:
        """All that is left of the answer, as one piece; waits for its end."""
        parts = list(self)
        logprobs = [p for d in parts if d.logprobs for p in d.logprobs]
        end = parts[-1] if parts else Delta()
        return Delta(
            "".join(d.text for d in parts), tuple(i for d in parts for i in d.ids),
            tuple(logprobs) if any(d.logprobs is not None for d in parts) else None, end.finish, end.error,
        )  # fmt: skip

    def deliver(self, delta: Delta) -> None:
        """Hand a piece on; the engine's side. What a callback raises is the engine's to deal with."""
        if self._on_delta is not None:
            self._on_delta(delta)
        else:
            self._queue.put(delta)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.cancel()
