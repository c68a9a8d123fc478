"""Answers in JSON and calls that are forced: what OpenAI's client reads is what was asked for."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jsonschema_rs
import openai
import pydantic
import pytest

from serve.live import Live, make_adapter
from truetune.config.lora import LoRA

pytestmark = pytest.mark.skipif(importlib.util.find_spec("llguidance") is None, reason="llguidance is not installed")

HERMES = (
    "{%- if tools %}{{ tools | tojson }} <tool_call>{\"name\": …, \"arguments\": …}</tool_call>{% endif -%}"
    "{%- for m in messages -%}<{{ m.role }}>{{ m.content }}{%- endfor -%}"
)  # fmt: skip
HI: Any = [{"role": "user", "content": "hi"}]
CITY = {
    "type": "object",
    "properties": {"rain": {"type": "boolean"}, "wind": {"enum": ["n", "s"]}},
    "required": ["rain", "wind"],
    "additionalProperties": False,
}
FORM: Any = {"type": "json_schema", "json_schema": {"name": "city", "strict": True, "schema": CITY}}


def tool(name: str, parameters: Any = CITY) -> Any:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


@pytest.fixture(scope="module")
def caller(start: Callable[..., Any], make_tiny: Callable[..., Path], tmp_path_factory: Any) -> Iterator[Live]:
    """A model of chance with room for calls, and an adapter whose template writes them as Hermes does."""
    folder = tmp_path_factory.mktemp("caller")
    model = make_tiny(folder / "model", max_position_embeddings=1024)
    make_adapter(model, folder / "adapters" / "hermes", LoRA(rank=2, alpha=8), seed=1, template=HERMES)
    with start(model=str(model), adapters=(str(folder / "adapters"),), served_name="base", max_new_tokens=400) as live:
        yield live


def ask(live: Live, **settings: Any) -> Any:
    given = {"model": "base", "messages": HI, "temperature": 1.0, "max_tokens": 400, "seed": 0} | settings
    return live.client.chat.completions.create(**given)


def streamed(live: Live, **settings: Any) -> tuple[str, list[tuple[str, str]], list[str]]:
    """Text, calls and reasons of a streamed answer."""
    text, calls, reasons = "", [], []
    for event in ask(live, stream=True, **settings):
        for choice in event.choices:
            text += choice.delta.content or ""
            calls += [(call.function.name, call.function.arguments) for call in choice.delta.tool_calls or ()]
            reasons += [choice.finish_reason] if choice.finish_reason else []
    return text, calls, reasons


@pytest.mark.parametrize("seed", range(3))
def test_an_answer_keeps_to_a_schema_whole_and_streamed(caller: Live, seed: int) -> None:
    (choice,) = ask(caller, response_format=FORM, seed=seed).choices
    jsonschema_rs.validate(CITY, json.loads(choice.message.content))
    assert choice.finish_reason == "stop"
    text, calls, reasons = streamed(caller, response_format=FORM, seed=seed)
    assert (text, calls, reasons) == (choice.message.content, [], ["stop"])


def test_choices_of_one_request_differ_and_all_keep_to_it(caller: Live) -> None:
    found = ask(caller, response_format=FORM, n=4).choices
    for choice in found:
        jsonschema_rs.validate(CITY, json.loads(choice.message.content))
    assert len({choice.message.content for choice in found}) > 1


def test_json_object_is_an_object(caller: Live) -> None:
    found = [c for c in ask(caller, response_format={"type": "json_object"}, n=8).choices if c.finish_reason == "stop"]
    assert found
    assert all(isinstance(json.loads(choice.message.content), dict) for choice in found)
    (cut,) = ask(caller, response_format=FORM, max_tokens=2).choices
    assert (cut.finish_reason, cut.message.content[:1]) == ("length", "{")


def test_text_is_any_text(caller: Live) -> None:
    plain = ask(caller, max_tokens=20).choices[0].message.content
    assert ask(caller, max_tokens=20, response_format={"type": "text"}).choices[0].message.content == plain


def test_a_named_call_is_made_once(caller: Live) -> None:
    chosen: Any = {"type": "function", "function": {"name": "ask_ö"}}
    settings: dict[str, Any] = {"model": "hermes", "tools": [tool("other"), tool("ask_ö")], "tool_choice": chosen}
    (choice,) = ask(caller, **settings).choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    (call,) = choice.message.tool_calls
    assert call.function.name == "ask_ö"
    jsonschema_rs.validate(CITY, json.loads(call.function.arguments))
    _, calls, reasons = streamed(caller, **settings)
    assert (calls, reasons) == ([("ask_ö", call.function.arguments)], ["tool_calls"])


def test_a_required_call_is_one_of_those_offered(caller: Live) -> None:
    settings: dict[str, Any] = {"model": "hermes", "tools": [tool("one"), tool("two")], "tool_choice": "required"}
    found = ask(caller, n=8, parallel_tool_calls=False, **settings).choices
    assert [len(choice.message.tool_calls) for choice in found] == [1] * 8
    names = {choice.message.tool_calls[0].function.name for choice in found}
    assert names == {"one", "two"}
    many = [c for c in ask(caller, n=8, **settings).choices if c.finish_reason == "tool_calls"]
    assert any(len(choice.message.tool_calls) > 1 for choice in many)
    for choice in many:
        for call in choice.message.tool_calls:
            jsonschema_rs.validate(CITY, json.loads(call.function.arguments))


def test_an_answer_in_json_may_be_a_call_where_there_are_tools(caller: Live) -> None:
    found = ask(caller, model="hermes", tools=[tool("one")], response_format=FORM, n=16, temperature=1.5).choices
    for choice in found:
        if choice.finish_reason == "tool_calls":
            assert {call.function.name for call in choice.message.tool_calls} == {"one"}
        elif choice.finish_reason == "stop":
            jsonschema_rs.validate(CITY, json.loads(choice.message.content))
    assert {choice.finish_reason for choice in found} >= {"tool_calls", "stop"}


def test_a_call_that_is_cut_is_text(caller: Live) -> None:
    (choice,) = ask(caller, model="hermes", tools=[tool("one")], tool_choice="required", max_tokens=20).choices
    assert (choice.finish_reason, choice.message.tool_calls) == ("length", None)
    assert "<tool_call>" in choice.message.content


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model": "hermes", "tool_choice": {"type": "function", "function": {"name": "tow"}}}, "did you mean 'two'"),
        ({"model": "hermes", "tools": [tool("two", {"type": "string"})]}, "no schema of an object"),
        ({"model": "hermes", "tools": [tool("two", {"not": {}})]}, "Unimplemented keys"),
    ],
)
def test_a_call_that_can_not_be_forced_is_refused(caller: Live, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(openai.BadRequestError, match=said):
        ask(caller, **({"tools": [tool("two")], "tool_choice": "required"} | settings))


class City(pydantic.BaseModel):
    rain: bool
    wind: Literal["n", "s"]


def test_openais_client_parses_what_it_asked_for(caller: Live) -> None:
    found = caller.client.chat.completions.parse(
        model="base", messages=HI, response_format=City, temperature=1.0, seed=1, max_tokens=400
    )
    assert isinstance(found.choices[0].message.parsed, City)


def test_a_server_without_the_library_says_what_it_needs(
    start: Callable[..., Any], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with start(model=str(tiny_model), served_name="base", max_new_tokens=20) as live:
        with pytest.raises(openai.BadRequestError, match=r"pip install 'truetune\[json\]'"):
            ask(live, response_format=FORM, max_tokens=20)
        assert ask(live, max_tokens=2).choices[0].finish_reason in ("length", "stop")
