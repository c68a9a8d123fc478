"""The server itself: its socket, its connections, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Iterator
from types import FrameType
from typing import Any

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
        seconds: that a connection may take to send the head of its first request.
    """

    def __init__(self, app: ASGIApp, gate: Gate, *, drain: float, most: int, seconds: float) -> None:
        super().__init__(
            uvicorn.Config(
                app, http=_guarded(most, seconds), ws="none", lifespan="off", log_config=None, access_log=False,
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


def _guarded(most: int, seconds: float) -> type[H11Protocol]:
    """Connections that are limited in number, and in the time they may take to say something."""
    full = Refusal(503, f"{most} connections are open, and this server takes no more", kind="server_error")
    head = (
        f"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: \
{len(full.body)}\r\n\r\n"
    )

    class Guarded(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > most:
                transport.write(head.encode() + full.body)
                transport.close()
                return
            self.loop.call_later(seconds, self._close_if_silent)

        def _close_if_silent(self) -> None:
            scope: object = self.scope  # which is none until a head was read, whatever its type says
            if scope is None and not self.transport.is_closing():
                self.transport.close()

    return Guarded
