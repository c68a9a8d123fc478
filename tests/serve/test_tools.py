"""Calls of tools: offered through the template, read back where their form is known."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from serve.live import Live
from truetune.data.template import Template
from truetune.data.templates import BUILT_IN
from truetune.generate.request import Delta, Request
from truetune.recipes.generate import Speaker
from truetune.serve.catalogue import Voice
from truetune.serve.protocol import ChatRequest
from truetune.serve.refusal import Refusal
from truetune.serve.responses import ChatChunk
from truetune.serve.spoken import SpokenChat
from truetune.serve.tools import format_of
from truetune.serve.wording import Job, of_chat

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "ö"}}\n</tool_call>'
HERMES = (
    "{%- if tools %}{{ tools | tojson }} <tool_call>{\"name\": …, \"arguments\": …}</tool_call>{% endif -%}"
    "{%- for m in messages -%}<{{ m.role }}>{{ m.content }}{%- endfor -%}"
)  # fmt: skip
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        ("plain", "plain", []),
        (CALL, "", [("add", {"a": 1, "b": "ö"})]),
        (f"Let me see.\n{CALL}\n{CALL}", "Let me see.", [("add", {"a": 1, "b": "ö"})] * 2),
        ('<tool_call>{"name": "f", "arguments": {}}', "", [("f", {})]),  # the end was a stop token
        ("<tool_call>{broken}</tool_call>", "<tool_call>{broken}</tool_call>", []),
        ('<tool_call>{"name": 5}</tool_call>', '<tool_call>{"name": 5}</tool_call>', []),
        ('<tool_call>{"name": "f", "arguments": []}</tool_call>', None, []),
        ("a <tool_cal", "a <tool_cal", []),
    ],
)
def test_calls_are_read_or_stay_text(text: str, said: str | None, calls: list[Any]) -> None:
    form = format_of(HERMES)
    assert form is not None
    found, read = form.split(text)
    assert found == (text if said is None else said)
    assert [(call.function.name, json.loads(call.function.arguments)) for call in read] == calls
    assert len({call.id for call in read}) == len(calls)


def test_what_is_certain_never_has_to_be_taken_back() -> None:
    form = format_of(HERMES)
    assert form is not None
    text = f"one < two <tool\n\n{CALL}"
    told = [text[: form.certain(text[:n])] for n in range(len(text) + 1)]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(told))
    assert told[-1] == form.split(text)[0] == "one < two <tool"


def test_forms_are_known_by_the_template() -> None:
    assert format_of(BUILT_IN["chatml"]) is None
    assert format_of("<tool_call><function={{ name }}></tool_call>") is None
    assert format_of(HERMES) is not None


def voice(live: Live, source: str) -> Voice:
    base = live.service.catalogue.base.speaker
    return Voice("own", Speaker(base.model, base.tokenizer, Template("own", source), base.stop_ids))


def asked(**fields: Any) -> ChatRequest:
    messages = [{"role": "user", "content": "1+1?"}]
    return ChatRequest.model_validate_json(json.dumps({"model": "own", "messages": messages, "tools": [TOOL]} | fields))


def test_tools_go_through_the_template(live: Live) -> None:
    speaker = voice(live, HERMES)
    job = of_chat(asked(), speaker, live.service.allowed)
    text = live.service.catalogue.base.speaker.tokenizer.decode(job.prompts[0])
    assert text.startswith('[{"type": "function", "function": {"name": "add"')
    assert text.endswith("<user>1+1?")
    assert job.tools is not None
    none = of_chat(asked(tool_choice="none"), speaker, live.service.allowed)
    assert live.service.catalogue.base.speaker.tokenizer.decode(none.prompts[0]) == "<user>1+1?"
    assert none.tools is None
    with pytest.raises(Refusal, match="no place for tools"):
        of_chat(asked(), voice(live, "{{ messages[0].content }}"), live.service.allowed)


def test_earlier_calls_reach_the_template_as_objects_or_as_text(live: Live) -> None:
    call = {"id": "x", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    turns = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "x", "content": "2"},
    ]
    objects = "{% for m in messages %}{{ m.tool_calls[0].function.arguments.a if m.tool_calls }}{% endfor %}"
    texts = "{% for m in messages %}{{ (m.tool_calls[0].function.arguments + '!') if m.tool_calls }}{% endfor %}"
    for source, expected in ((objects, "1"), (texts, '{"a": 1}!')):
        job = of_chat(asked(messages=turns, tools=None), voice(live, source), live.service.allowed)
        assert live.service.catalogue.base.speaker.tokenizer.decode(job.prompts[0]) == expected


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_streamed_call_is_the_whole_one(live: Live, size: int) -> None:
    text = f"Let me see. {CALL}"
    job = Job(voice(live, HERMES), ((1,),), (Request([1]),), ("",), format_of(HERMES))
    deltas = [Delta(text[i : i + size], (5,)) for i in range(0, len(text), size)] + [Delta(finish="stop")]
    spoken = SpokenChat(job, wants_usage=False, wants_logprobs=False)
    choices = []
    for delta in deltas:
        for event in spoken.pieces(0, [delta]):
            assert isinstance(event, ChatChunk)
            choices += event.choices
    assert "".join(choice.delta.content or "" for choice in choices) == "Let me see."
    calls = [call for choice in choices for call in choice.delta.tool_calls]
    assert [(call.index, call.function.name) for call in calls] == [(0, "add")]
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["tool_calls"]
    whole = json.loads(spoken.whole().wire())["choices"][0]
    assert (whole["message"]["content"], whole["finish_reason"]) == ("Let me see.", "tool_calls")
    assert json.loads(whole["message"]["tool_calls"][0]["function"]["arguments"]) == {"a": 1, "b": "ö"}
