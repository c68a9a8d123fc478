"""Connections of clients that are slow, silent, garbled or many: none holds its place, and the others are answered."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from serve.live import Live, wait_until

CHAT = "/v1/chat/completions"
BODY = json.dumps({"model": "base", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}).encode()
STALL = 0.6


@pytest.fixture(scope="module")
def strict(start: Callable[..., Any], tiny_model: Path) -> Iterator[Live]:
    """A server with little patience and few places."""
    with start(model=str(tiny_model), served_name="base", max_connections=20, max_stall=STALL, max_body="20KB") as live:
        yield live


def connect(live: Live) -> socket.socket:
    host, port = live.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def head(path: str = CHAT, length: int = len(BODY), method: str = "POST", more: str = "") -> bytes:
    return (f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {length}\r\n{more}\r\n").encode()  # fmt: skip


def seconds_until_closed(one: socket.socket, drip: bytes = b"") -> float:
    """How long the server bears a client that sends ``drip`` ten times a second."""
    began = time.monotonic()
    one.settimeout(0.1)
    while time.monotonic() < began + 10:
        try:
            if drip:
                one.sendall(drip)
            if not one.recv(65536):
                return time.monotonic() - began
        except TimeoutError:
            continue
        except OSError:
            return time.monotonic() - began
    raise AssertionError("it stays open")


def answer(one: socket.socket) -> bytes:
    """All that comes until the server closes, or falls silent for a moment."""
    found = b""
    one.settimeout(2)
    try:
        while part := one.recv(65536):
            found += part
            if b"\r\n\r\n" in found and b"connection: close" not in found.lower():
                one.settimeout(0.2)
    except OSError:
        pass
    return found


def open_connections(live: Live) -> int:
    return len(live.server.server_state.connections)


@pytest.mark.parametrize("begun", [b"", b"POST /v1/ch", b"POST / HTTP/1.1\r\nX-A: b\r\n"])
def test_a_head_that_trickles_in_is_cut_off(strict: Live, begun: bytes) -> None:
    with connect(strict) as one:
        one.sendall(begun)
        assert seconds_until_closed(one, b"x" if begun else b"") < 3 * STALL


def test_a_second_head_that_trickles_in_is_cut_off_too(strict: Live) -> None:
    with connect(strict) as one:
        one.sendall(head() + BODY)
        assert b" 200 " in answer(one)
        assert seconds_until_closed(one, b"\r") < 3 * STALL


@pytest.mark.parametrize(
    ("path", "method", "status"), [(CHAT, "POST", b"408"), ("/nothing", "POST", b"404"), (CHAT, "GET", b"405")]
)
def test_a_body_that_trickles_in_is_answered_and_cut_off(strict: Live, path: str, method: str, status: bytes) -> None:
    with connect(strict) as one:
        one.sendall(head(path, 5000, method))
        found = answer(one)
        assert found.startswith(b"HTTP/1.1 " + status)
        assert b"connection: close" in found.lower()
        assert json.loads(found.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"
    wait_until(lambda: open_connections(strict) == 0)


def test_a_body_that_nobody_asked_for_does_not_hold_a_place(strict: Live) -> None:
    with connect(strict) as one:
        one.sendall(head("/v1/models", 5000, "GET"))
        found = answer(one)
        assert b" 200 " in found
        assert b"connection: close" in found.lower()
        assert seconds_until_closed(one, b"x") < 3 * STALL


def test_a_refusal_whose_body_has_come_keeps_the_connection(strict: Live) -> None:
    with connect(strict) as one:
        for _ in range(3):
            one.sendall(head("/nothing") + BODY)
            found = answer(one)
            assert b" 404 " in found
            assert b"connection: close" not in found.lower()


def test_a_client_that_waits_to_be_told_is_refused_before_it_sends(strict: Live) -> None:
    with connect(strict) as one:
        one.sendall(head(length=10**7, more="Expect: 100-continue\r\n"))
        assert answer(one).startswith(b"HTTP/1.1 413")
    with connect(strict) as one:
        one.sendall(head(more="Expect: 100-continue\r\n"))
        assert one.recv(1000).startswith(b"HTTP/1.1 100")
        one.sendall(BODY)
        assert answer(one).startswith(b"HTTP/1.1 200")


def test_a_client_that_takes_nothing_in_is_given_up(strict: Live) -> None:
    host, port = strict.url.removeprefix("http://").split(":")
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        one.connect((host, int(port)))
        one.settimeout(0.5)
        try:
            for _ in range(200):  # answers of 20 MB in all: more than sockets hold
                one.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 10)
        except OSError:
            pass
        assert open_connections(strict) <= 1
        wait_until(lambda: open_connections(strict) == 0, seconds=5 * STALL)  # far sooner than an idle one is closed


@pytest.mark.parametrize("text", [b"\x00\x01\x02\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00"])
def test_what_is_no_http_is_told_so(strict: Live, text: bytes) -> None:
    with connect(strict) as one:
        one.sendall(text + b"\r\n" * 3)
        found = answer(one)
        assert found.startswith(b"HTTP/1.1 400")
        assert json.loads(found.partition(b"\r\n\r\n")[2])["error"]["message"] == "this is no HTTP"


def test_a_head_without_end_is_refused(strict: Live) -> None:
    with connect(strict) as one:
        one.sendall(b"GET / HTTP/1.1\r\nX-Long: " + b"a" * 70_000)
        assert answer(one).startswith(b"HTTP/1.1 400")


def test_thousands_of_connections_come_and_go(strict: Live) -> None:
    for batch in range(50):
        many = [connect(strict) for _ in range(40)]  # twice as many as there are places
        for number, one in enumerate(many):
            try:
                if number % 4 == 0:
                    one.sendall(head()[: batch + 1])
                elif number % 4 == 1:
                    one.sendall(head() + BODY[:10])
            except OSError:  # it was one too many
                pass
            one.close()
    wait_until(lambda: open_connections(strict) == 0)
    assert strict.ask(CHAT, json.loads(BODY))[0] == 200
    strict.settle()
