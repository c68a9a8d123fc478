"""Answers as they come from the engine's thread to the event loop: the engine never waits for a client.

What a slow client has not taken yet waits here: pieces of its own answers, whose length is limited, and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

from typing_extensions import Self

from truetune.errors import AdapterError, TruetuneError
from truetune.generate.engine import Engine
from truetune.generate.request import Delta, Handle, Request
from truetune.generate.shelf import AdapterChangedError
from truetune.serve.refusal import of_error, too_late, unavailable

News = list[tuple[int, Delta]]


class Running:
    """The answers to one request; leaving the context cancels those that have not ended.

    Args:
        workers: where the engine is asked, which may take as long as one of its steps.
        seconds: after which it is given up.
        seen: told of all that comes.
    """

    def __init__(
        self, engine: Engine, requests: Sequence[Request], *, workers: ThreadPoolExecutor, seconds: float,
        seen: Callable[[News], None],
    ) -> None:  # fmt: skip
        self._engine, self._requests, self._workers, self._seen = engine, requests, workers, seen
        self._loop = asyncio.get_running_loop()
        self._until = self._loop.time() + seconds
        self._seconds = seconds
        self._handles: list[Handle] = []
        self._waiting: News = []
        self._arrival = asyncio.Event()
        self._open = len(requests)
        self._left = False

    async def __aenter__(self) -> Self:
        """Ask for all of them.

        Raises:
            Refusal: a prompt that does not fit, or an adapter that can't be loaded any more.
            AdapterChangedError: it is another than the one that the prompts were worded for.
        """
        try:
            await self._loop.run_in_executor(self._workers, self._submit)
        except BaseException as error:
            self._cancel()
            if isinstance(error, AdapterError) and not isinstance(error, AdapterChangedError):
                raise unavailable(str(self._requests[0].adapter), error) from None
            if isinstance(error, TruetuneError) and not isinstance(error, AdapterError):
                context = self._engine.context
                is_long = context is not None and max(len(r.prompt_ids) for r in self._requests) >= context
                raise of_error(error, code="context_length_exceeded" if is_long else None) from None
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._cancel()

    async def news(self) -> AsyncIterator[News]:
        """What has come since the last time, with the number of the request each piece belongs to, until all ended.

        Raises:
            Refusal: the time is up.
        """
        while self._open:
            left = self._until - self._loop.time()
            try:
                await asyncio.wait_for(self._arrival.wait(), max(left, 0.0))
            except (TimeoutError, asyncio.TimeoutError):
                raise too_late(self._seconds) from None
            self._arrival.clear()
            news, self._waiting = self._waiting, []
            self._open -= sum(delta.finish is not None for _, delta in news)
            self._seen(news)
            yield news

    def _submit(self) -> None:
        for number, request in enumerate(self._requests):
            if self._left:
                return
            self._handles.append(self._engine.submit(request, functools.partial(self._from_engine, number)))
        if self._left:  # whoever asked went away meanwhile
            self._cancel()

    def _from_engine(self, number: int, delta: Delta) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody listens any more
            self._loop.call_soon_threadsafe(self._arrived, number, delta)

    def _arrived(self, number: int, delta: Delta) -> None:
        self._waiting.append((number, delta))
        self._arrival.set()

    def _cancel(self) -> None:
        self._left = True
        for handle in self._handles:
            handle.cancel()
