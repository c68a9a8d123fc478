"""What one client may take, and who may come in at all; every rule holds before a route is reached."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope

from truetune.errors import counted
from truetune.serve.refusal import Refusal

_OPEN = ("/health",)
_RETRY_AFTER = 1


@dataclass
class Gate:
    """Counts answers that are being worked on or wait.

    Args:
        most: of them at a time.
    """

    most: int
    taken: int = 0
    closed: bool = False  # the server is stopping

    @contextlib.contextmanager
    def room_for(self, count: int) -> Iterator[None]:
        """Inside, so many answers are counted.

        Raises:
            Refusal: 503 while the server stops, 429 where too many wait, 400 for more than could ever be taken.
        """
        self.check_open()
        if count > self.most:
            raise Refusal(400, f"{count} answers in one request, and this server takes {self.most} at a time")
        if self.taken + count > self.most:
            raise Refusal(
                429,
                f"{counted(self.taken, 'answer is', 'answers are')} running or waiting, and {self.most} is all this "
                "server takes",
                kind="rate_limit_error", code="queue_full", retry_after=_RETRY_AFTER,
            )  # fmt: skip
        self.taken += count
        try:
            yield
        finally:
            self.taken -= count

    def check_open(self) -> None:
        """Raises Refusal (503) while the server stops."""
        if self.closed:
            raise Refusal(503, "the server is stopping: it takes no new requests", kind="server_error",
                          code="stopping", retry_after=_RETRY_AFTER)  # fmt: skip


@dataclass(frozen=True)
class Door:
    """Checks what every request must have.

    Attributes:
        token: the API key; None where only this machine can reach the server.
        local_only: the name under which it is reached must be this machine's. A web page could otherwise have its own
            name lead here, and read answers as if they were its own site's.
    """

    token: str | None
    local_only: bool

    def check(self, scope: Scope) -> None:
        """Raises Refusal: 401 without the right key, 403 for another machine's name."""
        headers = Headers(scope=scope)
        if self.local_only and not _is_here(headers.get("host", "")):
            raise Refusal(403, "this server answers to localhost alone; --host and --token open it", code="wrong_host")
        if self.token is None or scope["path"] in _OPEN:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        is_right = hmac.compare_digest(given.strip().encode("latin-1", "replace"), self.token.encode())
        if scheme.lower() != "bearer" or not is_right:
            raise Refusal(401, "the API key is missing or wrong: send it as 'Authorization: Bearer KEY'",
                          kind="authentication_error", code="invalid_api_key")  # fmt: skip


class Body:
    """What of a request's body has come, told by what passes through ``receive``."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        headers, self._receive = Headers(scope=scope), receive
        self._waits = "expect" in headers  # the client sends it once it is told to go on
        self.is_read = headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers

    async def receive(self) -> Message:
        """The next part."""
        message = await self._receive()
        if message["type"] == "http.request" and not message.get("more_body", False):
            self.is_read = True
        return message

    async def pass_over(self, *, most: int, seconds: float = 0.2) -> None:
        """Let what is under way arrive, as a connection that is closed on it loses the answer too."""
        if self.is_read or self._waits:
            return
        with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
            await asyncio.wait_for(self._rest(most), seconds)

    async def _rest(self, most: int) -> None:
        while not self.is_read and most > 0:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                return
            most -= len(message.get("body", b""))


async def read_body(scope: Scope, receive: Receive, *, most: int, seconds: float) -> bytes:
    """The body of a request.

    Raises:
        Refusal: 415 for anything but JSON, 413 beyond ``most`` bytes, 408 where it does not come, 499 from who left.
    """
    headers = Headers(scope=scope)
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # It also keeps web pages out: a browser sends JSON elsewhere only after asking, and is not answered.
        raise Refusal(415, f"the body is {kind or 'of no type'}: send it with 'Content-Type: application/json'")
    if (length := headers.get("content-length", "")).isdecimal() and int(length) > most:
        raise _too_large(most)
    try:
        return await asyncio.wait_for(_read(receive, most), seconds)
    except (TimeoutError, asyncio.TimeoutError):
        raise Refusal(408, f"the body did not come within {seconds:g} seconds", code="timeout") from None


async def _read(receive: Receive, most: int) -> bytes:
    found = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refusal(499, "the client left")
        found += message.get("body", b"")
        if len(found) > most:
            raise _too_large(most)
        if not message.get("more_body", False):
            return bytes(found)


def _too_large(most: int) -> Refusal:
    return Refusal(413, f"the body is larger than {most:,} bytes", code="body_too_large")


def _is_here(host: str) -> bool:
    name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
    name = name.strip("[]").lower().rstrip(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
