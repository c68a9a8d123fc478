"""Server-sent events: an answer while it is made, to a client that may be slow or leave."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import defaultdict
from collections.abc import Awaitable
from typing import TypeVar

from starlette.types import Receive, Send

from truetune.generate.request import Delta
from truetune.serve.refusal import Refusal
from truetune.serve.running import News, Running
from truetune.serve.spoken import Spoken

T = TypeVar("T")
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class ClientLeftError(Exception):
    """Nobody waits for the answer any more."""


async def unless_left(receive: Receive, work: Awaitable[T]) -> T:
    """What ``work`` gives; it is cancelled when the client leaves.

    Raises:
        ClientLeftError: it did.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeftError
        return task.result()
    finally:
        for one in (task, watch):
            one.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await one


async def send_stream(running: Running, spoken: Spoken, send: Send, *, wants_usage: bool, stall: float) -> None:
    """Write an answer's events.

    Args:
        stall: seconds that the client may take for one write.
    Raises:
        ClientLeftError: it took longer.
    """

    async def write(data: str) -> None:
        body = f"data: {data}\n\n".encode()
        try:
            await asyncio.wait_for(send({"type": "http.response.body", "body": body, "more_body": True}), stall)
        except (TimeoutError, asyncio.TimeoutError, OSError):
            raise ClientLeftError from None

    await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
    try:
        for event in spoken.opening():
            await write(event.wire())
        async for news in running.news():
            for number, deltas in _by_answer(news):
                for event in spoken.pieces(number, deltas):
                    await write(event.wire())
        if wants_usage:
            await write(spoken.closing().wire())
        await write("[DONE]")
    except Refusal as refusal:  # too late for a status of its own
        await write(json.dumps(refusal.content))
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def heard_whole(running: Running, spoken: Spoken) -> None:
    """Take all of an answer in. Raises Refusal where it failed."""
    async for news in running.news():
        for number, delta in news:
            spoken.heard[number].hear(delta, spoken.job.voice.speaker.stop_ids)


def _by_answer(news: News) -> list[tuple[int, list[Delta]]]:
    """Pieces of one answer together, in their order: a slow client gets fewer and longer ones."""
    found: dict[int, list[Delta]] = defaultdict(list)
    for number, delta in news:
        found[number].append(delta)
    return list(found.items())


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
