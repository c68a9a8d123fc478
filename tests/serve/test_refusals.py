"""What can't be answered is refused in OpenAI's form, by name and with the right status; and the server lives."""

from __future__ import annotations

import json
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from serve.live import Live, make_adapter, wait_until
from truetune.config.lora import LoRA
from truetune.errors import AdapterError, ConfigError
from truetune.serve.limits import Door
from truetune.serve.refusal import Refusal

HI = [{"role": "user", "content": "hi"}]
CHAT, TEXT, VECTOR = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
SMALL: dict[str, Any] = {"model": "base", "messages": HI, "max_tokens": 3}
TOOL = {"type": "function", "function": {"name": "f"}}
DEEP: dict[str, Any] = {}
for _ in range(80):
    DEEP = {"type": "object", "properties": {"a": DEEP}}


@pytest.fixture(autouse=True)
def _lives_on(live: Live) -> Iterator[None]:
    """Whatever a test does, the next request is answered and nothing is left behind."""
    yield
    assert live.ask(CHAT, SMALL)[0] == 200
    live.settle()


def chat(**fields: Any) -> dict[str, Any]:
    return {**SMALL, **fields}


def schema(value: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "own", "schema": value}}


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in SMALL.items() if key != name}


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "said"),
    [
        (CHAT, b"{", 400, None, "not valid JSON"),
        (CHAT, b"", 400, None, "not valid JSON"),
        (CHAT, b'{"model": "\xff"}', 400, None, "not valid JSON"),
        (CHAT, b'{"model": "\\ud800"}', 400, None, "not valid JSON"),
        (CHAT, b"[" * 50_000, 400, None, "not valid JSON"),
        (CHAT, [], 400, None, "the body"),
        (CHAT, without("model"), 400, "model", "is required"),
        (CHAT, without("messages"), 400, "messages", "is required"),
        (CHAT, chat(messages=[]), 400, "messages", "at least 1"),
        (CHAT, chat(messages="hi"), 400, "messages", "valid array"),
        (CHAT, chat(messages=[{"role": "user"}]), 400, "messages", "`content` is missing"),
        (CHAT, chat(messages=[{"role": "usr", "content": "hi"}]), 400, "messages", "perhaps 'user' is meant"),
        (CHAT, chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), 400, "messages", "image_url"),
        (CHAT, chat(messages=[*HI, {"role": "assistant", "tool_calls": [1]}]), 400, "messages", "tool_calls"),
        (CHAT, chat(max_tokens="3"), 400, "max_tokens", "integer"),
        (CHAT, chat(max_tokens=True), 400, "max_tokens", "integer"),
        (CHAT, chat(max_tokens=0), 400, "max_tokens", "greater than or equal to 1"),
        (CHAT, chat(max_tokens=10**30), 400, "max_tokens", "less than"),
        (CHAT, chat(max_tokens=100_000), 400, "max_tokens", "at most 200"),
        (CHAT, chat(max_completion_tokens=201), 400, "max_completion_tokens", "at most 200"),
        (CHAT, chat(temperature=float("nan")), 400, "temperature", "finite number"),
        (CHAT, chat(temperature=-1), 400, "temperature", "greater than"),
        (CHAT, chat(top_p=0), 400, "top_p", "greater than 0"),
        (CHAT, chat(n=0), 400, "n", "greater than"),
        (CHAT, chat(n=17), 400, "n", "less than"),
        (CHAT, chat(stop=[""]), 400, "stop.0", "at least 1"),
        (CHAT, chat(tempreature=1), 400, "tempreature", "is no field of this route"),
        (CHAT, chat(logit_bias={"5": 1}), 400, None, "logit_bias is not supported"),
        (CHAT, chat(top_logprobs=1), 400, None, "goes with logprobs"),
        (CHAT, chat(stream_options={"include_usage": True}), 400, None, "goes with stream"),
        (CHAT, chat(response_format={"type": "xml"}), 400, "response_format.type", "'json_object'"),
        (CHAT, chat(response_format={"type": "json_schema"}), 400, "response_format", "go together"),
        (CHAT, chat(response_format=schema({"not": {}})), 400, "response_format", "Unimplemented keys"),
        (CHAT, chat(response_format=schema({"$ref": "#"})), 400, "response_format", "no text begins"),
        (CHAT, chat(response_format=schema({"$ref": "/etc/passwd"})), 400, "response_format", "/etc/passwd"),
        (CHAT, chat(response_format=schema(DEEP)), 400, "response_format", "recursion limit"),
        (CHAT, chat(tool_choice="required"), 400, "tool_choice", "there are no tools"),
        (CHAT, chat(tool_choice="always"), 400, "tool_choice", "'none'"),
        (CHAT, chat(tool_choice="required", response_format={"type": "json_object"}), 400, None, "leave one of them"),
        (CHAT, chat(tools=[TOOL], parallel_tool_calls=False), 400, None, "where tool_choice forces one"),
        (CHAT, chat(tools=[{"type": "function"}]), 400, "tools", "has no name"),
        (CHAT, chat(tools=[{"type": "function", "function": {"name": "f"}}]), 400, "messages", "no place for tools"),
        (CHAT, chat(messages=[{"role": "user", "content": "x" * 300}]), 400, None, "the model's context is 256"),
        (CHAT, chat(messages=[{"role": "user", "content": "x" * 90_000}]), 400, "messages", "90,000 characters"),
        (TEXT, {"model": "base", "prompt": ["a", "x" * 90_000]}, 400, "prompt", "90,000 characters"),
        (VECTOR, {"model": "base", "input": "x" * 90_000}, 400, "input", "90,000 characters"),
        (TEXT, {"model": "base", "prompt": "a", "repetition_penalty": 1e-300}, 400, "repetition_penalty", "0.01"),
        (CHAT, chat(model="../red"), 404, "model", "there is no model '../red'"),
        (CHAT, chat(model="/etc/passwd"), 404, "model", "there is no model"),
        (CHAT, chat(model="red/../blue"), 404, "model", "there is no model"),
        (CHAT, chat(model="re\x00d"), 404, "model", "there is no model"),
        (CHAT, chat(model="m" * 5000), 404, "model", "there is no model"),
        (CHAT, chat(model=""), 400, "model", "at least 1"),
        (TEXT, {"model": "base", "prompt": []}, 400, None, "at least one"),
        (TEXT, {"model": "base", "prompt": ""}, 400, None, "the prompt is empty"),
        (TEXT, {"model": "base", "prompt": [5, 10**9]}, 400, None, "the prompt has the id 1000000000"),
        (TEXT, {"model": "base", "prompt": [-1]}, 400, "prompt.0", "greater than or equal to 0"),
        (TEXT, {"model": "base", "prompt": [2**70], "echo": True}, 400, "prompt.0", "less than"),
        (TEXT, {"model": "base", "prompt": ["a"] * 65}, 400, "prompt", "at most 64"),
        (TEXT, {"model": "base", "prompt": "a", "suffix": "b"}, 400, None, "suffix is not supported"),
        (TEXT, {"model": "base", "prompt": "a", "best_of": 3}, 400, None, "best_of is not supported"),
        (TEXT, {"model": "base", "prompt": "a", "echo": True, "logprobs": 1}, 400, None, "echo does not go"),
        (VECTOR, {"model": "base", "input": []}, 400, None, "at least one"),
        (VECTOR, {"model": "base", "input": ["a", ""]}, 400, "input", "input 1: there is no token"),
        (VECTOR, {"model": "base", "input": "x" * 300}, 400, "input", "the model's context is 256"),
        (VECTOR, {"model": "base", "input": [[10**9]]}, 400, "input", "beyond the vocabulary"),
        (VECTOR, {"model": "base", "input": "a", "dimensions": 4}, 400, None, "dimensions is not supported"),
        ("/v1/nothing", SMALL, 404, None, "there is nothing at /v1/nothing"),
        ("/v1/models", SMALL, 405, None, "POST is not for this path"),
    ],
)  # fmt: skip
def test_a_request_that_can_not_be_answered(
    live: Live, path: str, body: object, status: int, param: str | None, said: str
) -> None:
    found, error = live.refused(path, body)
    assert (found, error["param"]) == (status, param)
    assert said in error["message"]
    assert error["type"] == "invalid_request_error"


def test_a_long_prompt_has_its_own_code(live: Live) -> None:
    _, error = live.refused(CHAT, chat(messages=[{"role": "user", "content": "x" * 300}]))
    assert error["code"] == "context_length_exceeded"
    assert live.refused(CHAT, chat(model="nobody"))[1]["code"] == "model_not_found"


def test_bodies_have_a_type_and_a_size(live: Live) -> None:
    assert live.refused(CHAT, SMALL, headers={"Content-Type": "text/plain"})[0] == 415
    large = json.dumps(chat(user="x" * 200_000)).encode()
    assert live.refused(CHAT, large)[0] == 413
    # Without a length said beforehand, too.
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as raw:
        raw.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                    "Transfer-Encoding: chunked\r\n\r\n".encode())  # fmt: skip
        piece = b"a" * 60_000
        for _ in range(2):
            raw.sendall(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        assert raw.recv(4096).startswith(b"HTTP/1.1 413")


def test_another_sites_name_does_not_lead_here(live: Live) -> None:
    status, error = live.refused("/v1/models", headers={"Host": "evil.example:80"})
    assert (status, error["code"]) == (403, "wrong_host")
    for name in ("localhost", "127.0.0.1:80", "[::1]:9", "LOCALHOST:1"):
        assert live.ask("/v1/models", headers={"Host": name})[0] == 200


@pytest.mark.parametrize("host", ["", "localhost.evil.example", "10.0.0.1", "127.0.0.1.evil.example", "[::2]"])
def test_names_that_are_not_this_machines(host: str) -> None:
    scope = {"type": "http", "path": "/", "headers": [(b"host", host.encode())]}
    with pytest.raises(Refusal, match="localhost alone"):
        Door(None, local_only=True).check(scope)
    Door(None, local_only=False).check(scope)


def test_a_token_is_asked_for_everywhere_but_of_health(start: Callable[..., Any], tiny_model: Path) -> None:
    with start(model=str(tiny_model), token="right-one", served_name="base") as live:
        assert live.client.models.list().data[0].id == "base"
        live.key = None
        for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing"):
            assert live.refused(path)[0] == 401
        for header in ("Bearer wrong-one", "Bearer right-one-and-more", "Bearer", "Basic right-one", "Bearer \xe9"):
            status, headers, _ = live.ask("/v1/models", headers={"Authorization": header})
            assert (status, headers["www-authenticate"]) == (401, "Bearer")
        assert live.ask("/health")[0] == 200
        live.key = "right-one"
        assert live.ask("/metrics", headers={"Host": "any.example"})[0] == 200


def test_more_than_the_queue_holds_is_told_to_come_back(start: Callable[..., Any], tiny_model: Path) -> None:
    with start(model=str(tiny_model), served_name="base", max_rows=1, max_queue=1) as live:
        slow = chat(max_tokens=200, stream=True, temperature=0)
        with live.client.chat.completions.create(**slow) as one, live.client.chat.completions.create(**slow) as two:
            next(iter(one))
            status, headers, _ = live.ask(CHAT, SMALL)
            assert (status, headers["retry-after"]) == (429, "1")
            del two
        assert live.refused(CHAT, chat(n=3))[0] == 400
        live.settle()
        assert live.ask(CHAT, SMALL)[0] == 200


def test_a_request_that_takes_too_long_is_given_up(start: Callable[..., Any], tiny_model: Path) -> None:
    with start(model=str(tiny_model), served_name="base", max_seconds=0.001) as live:
        status, error = live.refused(CHAT, chat(max_tokens=200))
        assert (status, error["code"]) == (504, "timeout")
        with pytest.raises(openai.APIError, match="no answer within"):
            list(live.client.chat.completions.create(**chat(max_tokens=200, stream=True)))
        live.settle()


def test_connections_are_limited_in_number_and_in_patience(start: Callable[..., Any], tiny_model: Path) -> None:
    with start(model=str(tiny_model), served_name="base", max_connections=2, max_stall=0.5) as live:
        host, port = live.url.removeprefix("http://").split(":")
        silent = [socket.create_connection((host, int(port)), timeout=10) for _ in range(2)]
        time.sleep(0.1)
        assert live.refused("/health")[0] == 503
        assert [one.recv(10) for one in silent] == [b"", b""]  # closed for having said nothing
        for one in silent:
            one.close()
        assert live.ask("/health")[0] == 200
        with socket.create_connection((host, int(port)), timeout=10) as slow:
            slow.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                         "Content-Length: 50\r\n\r\n{".encode())  # fmt: skip
            assert slow.recv(4096).startswith(b"HTTP/1.1 408")


def test_a_client_that_leaves_frees_its_place(live: Live) -> None:
    before = live.service.metrics.cancelled
    long = chat(max_tokens=200, temperature=0, stop=None)
    with live.client.chat.completions.create(**long, stream=True) as stream:
        next(iter(stream))
    live.settle()
    host, port = live.url.removeprefix("http://").split(":")
    body = json.dumps(chat(max_tokens=200, n=4)).encode()
    with socket.create_connection((host, int(port)), timeout=10) as raw:
        raw.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                    f"Content-Length: {len(body)}\r\n\r\n".encode() + body)  # fmt: skip
        wait_until(lambda: live.service.engine.stats()["running"] > 0)
    live.settle()
    wait_until(lambda: live.service.metrics.cancelled == before + 2)
    assert live.service.metrics.answer_tokens["base"] > 0


def test_a_client_that_does_not_read_holds_nobody_up(live: Live) -> None:
    host, port = live.url.removeprefix("http://").split(":")
    body = json.dumps(chat(max_tokens=200, n=3, stream=True, logprobs=True, top_logprobs=20)).encode()
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.connect((host, int(port)))
        raw.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                    f"Content-Length: {len(body)}\r\n\r\n".encode() + body)  # fmt: skip
        wait_until(lambda: live.service.gate.taken == 3)
        assert live.ask(CHAT, chat(max_tokens=20))[0] == 200
        wait_until(lambda: live.service.engine.stats()["running"] == 0)  # its answers end, whether it reads or not
    live.settle()


def test_adapters_come_change_break_and_go(start: Callable[..., Any], tiny_model: Path, tmp_path: Path) -> None:
    first, second = (make_adapter(tiny_model, tmp_path / str(n), LoRA(rank=2, alpha=8), seed=n) for n in (1, 2))
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / ".hidden").mkdir()
    (folder / "no adapter").mkdir()

    def said(name: str) -> str:
        found = live.client.chat.completions.create(**chat(model=name, max_tokens=10, temperature=0))
        return str(found.choices[0].message.content)

    with start(model=str(tiny_model), served_name="base", adapters=(str(folder), f"kept={first}")) as live:
        assert [model.id for model in live.client.models.list().data] == ["base", "kept"]
        shutil.copytree(first, folder / "new")
        assert [model.id for model in live.client.models.list().data] == ["base", "kept", "new"]
        assert said("new") == said("kept") != said("base")
        for file in second.iterdir():
            shutil.copyfile(file, folder / "new" / file.name)
        changed = said("new")
        assert changed not in (said("kept"), said("base"))
        (folder / "new" / "adapter_model.safetensors").write_bytes(b"cut")
        status, error = live.refused(CHAT, chat(model="new"))
        assert (status, error["code"]) == (503, "adapter_unavailable")
        assert error["message"] == "the adapter 'new' can't be loaded; the server's log says why"  # and no path of ours
        shutil.copyfile(second / "adapter_model.safetensors", folder / "new" / "adapter_model.safetensors")
        assert said("new") == changed
        shutil.rmtree(folder / "new")
        assert live.refused(CHAT, chat(model="new"))[0] == 404
        assert live.service.engine.stats()["adapters"] == ["kept"]


def test_adapters_that_do_not_belong_are_refused_at_the_start(
    start: Callable[..., Any], make_tiny: Callable[..., Path], tiny_model: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    other = make_tiny(tmp_path / "other", hidden_size=16)
    make_adapter(other, tmp_path / "all" / "wrong", LoRA(rank=2, alpha=8), seed=1)
    shutil.copytree(tmp_path / "all" / "wrong", tmp_path / "all" / "cut")
    (tmp_path / "all" / "cut" / "adapter_config.json").write_text("{", encoding="utf-8")
    with (
        pytest.raises(AdapterError, match="does not fit"),
        start(model=str(tiny_model), adapters=(f"wrong={tmp_path / 'all' / 'wrong'}",)),
    ):
        pass
    (tmp_path / "none").mkdir()
    folders = (str(tmp_path / "all"), str(tmp_path / "none"))
    with start(model=str(tiny_model), served_name="base", adapters=folders) as live:
        said = " ".join(capsys.readouterr().err.split())
        assert "cut is not served" in said  # the other's weights are looked at when it is asked for
        assert said.count("holds no adapter yet") == 1
        assert "none holds no adapter yet" in said
        for name in ("wrong", "cut"):
            assert live.refused(CHAT, chat(model=name))[0] == 503
        assert live.ask(CHAT, SMALL)[0] == 200


def test_adapters_in_a_folder_are_loaded_when_they_are_asked_for(
    live: Live, start: Callable[..., Any], tiny_model: Path, adapters_folder: Path
) -> None:
    with start(model=str(tiny_model), adapters=(str(adapters_folder), f"own={adapters_folder / 'red'}")) as other:
        shelf = other.service.engine.adapters
        assert shelf.loaded() == ["own"]
        assert other.ask(CHAT, chat(model="blue"))[0] == 200
        assert shelf.loaded() == ["own", "blue"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"adapters": ("nowhere",)}, "there is no folder nowhere"),
        ({"adapters": ("a/b={red}",)}, "can't be a model's name"),
        ({"adapters": ("x={red}", "x={red}")}, "two are called x"),
        ({"adapters": ("base={red}",)}, "base is what the base is called"),
        ({"host": "0.0.0.0"}, "no token is set"),
        ({"token": "spa ce and more"}, "without a space"),
        ({"host": "203.0.113.1", "token": "long-enough"}, "--host 203.0.113.1"),
        ({"served_name": "../x"}, "letters, digits"),
        ({"max_body": "much"}, "a size such as"),
    ],
)  # fmt: skip
def test_settings_that_can_not_be(
    start: Callable[..., Any], tiny_model: Path, adapters_folder: Path, settings: dict[str, Any], said: str
) -> None:
    if "adapters" in settings:
        named = tuple(text.replace("{red}", str(adapters_folder / "red")) for text in settings["adapters"])
        settings = {**settings, "adapters": named}
    with (
        pytest.raises(ConfigError, match=said),
        start(**({"model": str(tiny_model), "served_name": "base"} | settings)),
    ):
        pass
