"""Modelfiles: what Ollama would render from them is what the template that trained renders."""

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import SHARED
from truetune.data.schema import Message
from truetune.data.template import Template
from truetune.data.templates import BUILT_IN
from truetune.errors import TemplateError
from truetune.export.modelfile import Modelfile
from truetune.export.ollama import go_template
from truetune.models.tokenizer import ChatTokenizer

CONVERSATIONS: list[tuple[str | None, Sequence[str], Sequence[str]]] = [
    (None, ("Hello!",), ()),
    ("Be kind.\nAnd brief.", ("Hello!",), ()),
    (None, ("One?", "Two\n\n{{ two }}?", "Three?"), ("1", "<b>2</b>")),
    ("You count.", ("One?", "Two?"), ("1\n",)),
]


@pytest.fixture
def encoder(tiny_model: Path) -> ChatTokenizer:
    return ChatTokenizer.load(str(tiny_model))


def rendered_by_go(source: str, system: str | None, messages: list[dict[str, str]]) -> str:
    """The part of Go's text/template that is used, by its rules: https://pkg.go.dev/text/template."""
    parts = re.split(r"\{\{ (\"\{\{\"|.*?) \}\}", source)
    tree, rest = _block([("text", part) if i % 2 == 0 else ("do", part) for i, part in enumerate(parts)])
    assert not rest
    return _run(tree, {"System": system or "", "Messages": messages}, {}, {"System": system or ""})


def _block(steps: list[Any]) -> tuple[list[Any], list[Any]]:
    """``(nodes, what follows the end or else that closes them)``."""
    nodes = []
    while steps:
        kind, text = steps[0]
        if kind == "do" and (text == "end" or text.startswith("else")):
            return nodes, steps
        steps = steps[1:]
        if kind == "do" and text.startswith(("if ", "range ")):
            inner, steps = _block(steps)
            other: list[Any] = []
            if steps[0][1].startswith("else if "):
                other, steps = _block([("do", steps[0][1].removeprefix("else ")), *steps[1:]])
            else:
                if steps[0][1] == "else":
                    other, steps = _block(steps[1:])
                steps = steps[1:]
            nodes.append((*text.split(" ", 1), inner, other))
        else:
            nodes.append((kind, text))
    return nodes, steps


def _value(word: str, dot: dict[str, Any], names: dict[str, Any], root: dict[str, Any]) -> Any:
    if word.startswith('"'):
        return json.loads(word)
    if word in ("true", "false"):
        return word == "true"
    if word.startswith("$."):
        return root[word[2:]]
    return names[word] if word.startswith("$") else dot[word[1:]]


def _run(nodes: list[Any], dot: dict[str, Any], names: dict[str, Any], root: dict[str, Any]) -> str:
    out = ""
    for node in nodes:
        match node:
            case ("text", text):
                out += text
            case ("do", text) if "=" in text:
                name, _, value = re.split(r" (:?=) ", text)
                names[name] = _value(value, dot, names, root)
            case ("do", word):
                out += _value(word, dot, names, root)
            case ("range", over, inner, _):
                out += "".join(_run(inner, item, names, root) for item in _value(over, dot, names, root))
            case ("if", test, inner, other):
                words = test.split(" ")
                values = [_value(word, dot, names, root) for word in words if word != "eq"]
                holds = values[0] == values[1] if words[0] == "eq" else bool(values[0])
                out += _run(inner if holds else other, dot, names, root)
    return out


def expected(
    template: Template, encoder: ChatTokenizer, system: str | None, asked: Sequence[str], given: Sequence[str]
) -> str:
    messages = [Message("system", system)] if system else []
    for question, answer in itertools.zip_longest(asked, given):
        messages.append(Message("user", question, instruction=question, input=""))
        if answer is not None:
            messages.append(Message("assistant", answer))
    return template.render(encoder, messages, prompt=True).removeprefix(encoder.bos_token)


def check(template: Template, encoder: ChatTokenizer) -> None:
    go = go_template(template, encoder)
    for system, asked, given in CONVERSATIONS:
        turns = [("system", system)] if system else []
        for question, answer in itertools.zip_longest(asked, given):
            turns += [("user", question)] + ([("assistant", answer)] if answer is not None else [])
        messages = [{"Role": role, "Content": text} for role, text in turns]
        wanted = expected(template, encoder, system, asked, given)
        assert rendered_by_go(go.text, system, messages) == wanted


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_template_is_said_in_go(name: str, encoder: ChatTokenizer) -> None:
    check(Template(name, BUILT_IN[name]), encoder)


@pytest.mark.parametrize("name", ["qwen2.5-1.5b", "minimind"])
def test_a_tokenizers_own_template_is_found_by_looking(name: str, encoder: ChatTokenizer) -> None:
    path = SHARED / "models" / "tokenizer_configs" / name / "tokenizer_config.json"
    if not path.is_file():
        pytest.skip("needs ../shared/models/tokenizer_configs")
    check(Template("own", json.loads(path.read_text(encoding="utf-8"))["chat_template"]), encoder)


@pytest.mark.parametrize(
    ("source", "because"),
    [
        # The number of turns so far, what was asked, and the answers given are worded in three ways.
        ("{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}", "otherwise"),
        ("{% for m in messages %}[{{ m.content | upper }}]{% endfor %}", "not each told once"),
        ("{% for m in messages %}{{ m.content | replace('<', '') }}|{% endfor %}", "this conversation otherwise"),
        ("{{ messages[-1].content }}", "not each told once"),
    ],
)
def test_what_can_not_be_said_is_refused(source: str, because: str, encoder: ChatTokenizer) -> None:
    with pytest.raises(TemplateError, match=because):
        go_template(Template("odd", source), encoder)


def test_a_template_that_strips_says_so(encoder: ChatTokenizer) -> None:
    source = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</>{% endfor %}<assistant>"
    with pytest.raises(TemplateError):  # system messages with a line break at the end would differ
        go_template(Template("odd", source.replace("| trim", "| upper")), encoder)
    assert any("strips blanks" in remark for remark in go_template(Template("odd", source), encoder).remarks)


TRAINED = Modelfile(
    "./m.gguf", "T {{ .Prompt }}\n", adapter="./a.gguf", system="Be kind.", stops=("</s>", "</s>", "<e>")
)


def test_a_modelfile_has_all_its_parts() -> None:
    assert TRAINED.text().splitlines() == [
        "FROM ./m.gguf", "ADAPTER ./a.gguf", 'TEMPLATE """T {{ .Prompt }}', '"""', 'SYSTEM """Be kind."""',
        'PARAMETER stop """</s>"""', 'PARAMETER stop """<e>"""',
    ]  # fmt: skip
    with pytest.raises(TemplateError, match="quotation marks"):
        Modelfile("./m.gguf", 'say """ aloud').text()


def test_a_modelfile_is_read_as_it_was_written() -> None:
    read = Modelfile.of(TRAINED.text())
    assert read == replace(TRAINED, stops=("</s>", "<e>"))
    assert read.differences(TRAINED) == []


def test_a_modelfile_by_hand_is_read_as_ollama_reads_it() -> None:
    """Small letters, comments, single quotation marks, lines inside a text that look like instructions."""
    text = '''# FROM ./other.gguf
from ./m.gguf
PARAMETER temperature 0.2
TEMPLATE """first"""
TEMPLATE """{{ .Prompt }}
SYSTEM is no instruction here
"""
PARAMETER  stop  "<|e|>"
MESSAGE user TEMPLATE x
'''
    template = "{{ .Prompt }}\nSYSTEM is no instruction here\n"
    assert Modelfile.of(text) == Modelfile("./m.gguf", template, stops=("<|e|>",), more=("MESSAGE",))
    assert Modelfile.of('FROM ./m.gguf\nSYSTEM "Two\nlines."\n').system == "Two\nlines."


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"template": None}, "has no TEMPLATE"),
        ({"template": "T {{ .Prompt }}!\n"}, r"TEMPLATE is not what trained: .*!.*, and was "),
        ({"system": None}, "SYSTEM is none, and was 'Be kind.'"),
        ({"system": "Be rude."}, "SYSTEM is 'Be rude.', and was 'Be kind.'"),
        ({"stops": ("</s>", "<e>", ".")}, r"would end at '\.'"),
    ],
)
def test_what_a_modelfile_words_otherwise_is_said(change: dict[str, Any], words: str) -> None:
    (said,) = Modelfile.of(replace(TRAINED, **change).text()).differences(TRAINED)
    assert re.search(words, said)
