"""Embeddings take no more time and room than answers may, and none for a client that has left."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from serve.live import Live, wait_until

VECTOR = "/v1/embeddings"


def test_they_are_given_up_when_the_time_is_up(start: Callable[..., Any], tiny_model: Path) -> None:
    with start(model=str(tiny_model), served_name="base", max_seconds=0.05) as live, live.service.engine.lock:
        status, error = live.refused(VECTOR, {"model": "base", "input": ["a", "b"]})
        assert (status, error["code"]) == (504, "timeout")
        assert live.service.gate.taken == 0


def test_a_client_that_leaves_is_forgotten(live: Live) -> None:
    host, port = live.url.removeprefix("http://").split(":")
    body = json.dumps({"model": "base", "input": ["a"] * 8}).encode()
    before = live.service.metrics.cancelled
    with live.service.engine.lock:  # nothing is computed meanwhile
        with socket.create_connection((host, int(port)), timeout=10) as raw:
            raw.sendall(f"POST {VECTOR} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                        f"Content-Length: {len(body)}\r\n\r\n".encode() + body)  # fmt: skip
            wait_until(lambda: live.service.gate.taken == 8)
        wait_until(lambda: live.service.gate.taken == 0)
    wait_until(lambda: live.service.metrics.cancelled == before + 1)
    assert live.ask(VECTOR, {"model": "base", "input": "a"})[0] == 200


def test_texts_are_limited_in_number_and_in_all(start: Callable[..., Any], tiny_model: Path) -> None:
    with start(model=str(tiny_model), served_name="base", max_rows=1, max_queue=2, max_tokens=64) as live:
        status, error = live.refused(VECTOR, {"model": "base", "input": ["a"] * 4})
        assert (status, "this server takes 3" in error["message"]) == (400, True)
        status, error = live.refused(VECTOR, {"model": "base", "input": ["a" * 40, "b" * 40]})
        assert (status, error["param"]) == (400, "input")
        assert "80 tokens in all, and the server's --max-tokens is 64" in error["message"]
        assert live.ask(VECTOR, {"model": "base", "input": ["a" * 30, "b" * 30]})[0] == 200


def test_what_breaks_inside_is_told_in_plain_words(start: Callable[..., Any], tiny_model: Path) -> None:
    """A failure of the model names addresses, shapes and paths of ours: they are for the log."""
    with start(model=str(tiny_model), served_name="base") as live:
        chat = {"model": "base", "messages": [{"role": "user", "content": "hi"}]}
        live.service.engine.runner.logits = _fails  # type: ignore[method-assign]
        for stream in (False, True):
            status, _, body = live.ask("/v1/chat/completions", chat | {"stream": stream})
            text = body.decode()
            assert "/secret/place" not in text
            assert "the model failed at this answer; the log says how" in text
            assert status == (200 if stream else 500)


def _fails(pieces: object) -> Any:
    raise RuntimeError("no memory at /secret/place")
