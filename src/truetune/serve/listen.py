"""The server itself: its socket, its connections, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import http
import signal
import socket
from collections.abc import Iterator
from types import FrameType
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from truetune.errors import ConfigError
from truetune.serve.limits import Gate
from truetune.serve.refusal import Refusal

_KEEP_ALIVE = 20  # seconds that an idle connection is kept
_LARGEST_HEAD = 64 * 1024


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens there.

    Raises:
        ConfigError: the port is taken or not allowed, or the address is none of this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
        except OSError:
            found.close()
            raise
    except OSError as error:
        raise ConfigError(
            f"--host {host} --port {port}: {error.strerror or error}",
            ("way out", "another --port, or 0 for a free one; --host 127.0.0.1 is always there"),
        ) from None
    return found


class Server(uvicorn.Server):
    """Stops in two steps: first no new requests are taken while running answers end, then connections close.

    Args:
        gate: closed by the first signal.
        drain: seconds for running answers.
        most: open connections.
        seconds: that a connection may be without progress in what its client has to do.
    """

    def __init__(self, app: ASGIApp, gate: Gate, *, drain: float, most: int, seconds: float) -> None:
        guarded = type("Guarded", (Guarded,), {"most": most, "seconds": seconds})
        super().__init__(
            uvicorn.Config(
                app, http=guarded, ws="none", lifespan="off", log_config=None, log_level="error",
                access_log=False,
                server_header=False, timeout_keep_alive=_KEEP_ALIVE, timeout_graceful_shutdown=2,
                h11_max_incomplete_event_size=_LARGEST_HEAD,
            )
        )  # fmt: skip
        self.gate, self.drain = gate, drain
        self.signal: int | None = None
        self._ending: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Hear SIGINT and SIGTERM while the server runs, and raise neither again afterwards."""
        before = {}
        with contextlib.suppress(ValueError):  # not in the main thread: whoever runs us there handles signals
            for number in (signal.SIGINT, signal.SIGTERM):
                before[number] = signal.signal(number, self.handle_exit)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second one ends at once."""
        if self.signal is not None:
            self.should_exit = self.force_exit = True
        self.signal = self.signal or sig
        self.gate.closed = True

    async def on_tick(self, counter: int) -> bool:
        """Every tenth of a second: whether it is over."""
        if self.gate.closed and self._ending is None:
            self._ending = asyncio.ensure_future(self._drain())
        return await super().on_tick(counter)

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + self.drain
        while self.gate.taken and loop.time() < until:
            await asyncio.sleep(0.05)
        self.should_exit = True


class Guarded(H11Protocol):
    """Connections that are limited in number, and in the time they may take: to say something, to end a head or a body,
    to take in what was said to them. Whoever has made no progress with one of these for ``seconds`` is let go.
    """

    most: int
    seconds: float

    _debt: object = None  # what the client owed when it was looked at last, and since when
    _since = 0.0
    _pulse: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Take it, or turn it away where there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self.most:
            full = f"{self.most} connections are open, and this server takes no more"
            self._turn_away(Refusal(503, full, kind="server_error"))
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        """Look at it no more."""
        if self._pulse is not None:
            self._pulse.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """What was said is no HTTP; as an answer in our own form."""
        self._turn_away(Refusal(400, "this is no HTTP"))

    def _turn_away(self, refusal: Refusal) -> None:
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            self.transport.write(_raw(refusal))
        self.transport.close()

    def _look(self) -> None:
        debt, now = self._owed(), self.loop.time()
        if debt != self._debt:
            self._debt, self._since = debt, now
        elif debt is not None and now - self._since >= self.seconds:
            self.transport.abort()
            return
        self._pulse = self.loop.call_later(self.seconds / 8, self._look)

    def _owed(self) -> object:
        """None, or what the client is waited for, which changes when it goes on."""
        unsent = self.transport.get_write_buffer_size()
        if unsent and (self.transport.is_closing() or self.flow.write_paused):
            return "take", unsent
        state, cycle = self.conn.their_state, self.cycle
        if state is h11.IDLE and self.timeout_keep_alive_task is None:
            return "head", id(cycle)
        # A route that reads a body counts the time itself, and says so.
        is_answered = cycle is not None and cycle.response_complete
        return ("body", id(cycle)) if state is h11.SEND_BODY and is_answered else None


def _raw(refusal: Refusal) -> bytes:
    """A whole answer, for where no application is asked."""
    head = f"HTTP/1.1 {refusal.status} {http.HTTPStatus(refusal.status).phrase}\r\ncontent-type: application/json\r\n"
    return f"{head}connection: close\r\ncontent-length: {len(refusal.body)}\r\n\r\n".encode() + refusal.body
