"""Which template is meant, and what is said when none is."""

import json
from datetime import datetime
from pathlib import Path

import pytest

from conftest import CHATML, SHARED
from truetune.data.schema import Message
from truetune.data.template import BUILT_IN, Template, asks_for_date, pin_date, resolve_template, with_default_system
from truetune.errors import TemplateError
from truetune.models.tokenizer import ChatTokenizer


@pytest.fixture(scope="module")
def encoder(tiny_model: Path) -> ChatTokenizer:
    return ChatTokenizer.load(str(tiny_model))


def test_auto_is_the_tokenizer_s_own(encoder: ChatTokenizer) -> None:
    assert resolve_template("auto", encoder).source == CHATML


def test_auto_never_guesses(tmp_path: Path, make_tiny: object) -> None:
    bare = ChatTokenizer.load(str(make_tiny(tmp_path / "bare", chat_template=None)))  # type: ignore[operator]
    with pytest.raises(TemplateError, match="truetune does not guess one") as caught:
        resolve_template("auto", bare)
    assert "--template alpaca" in str(caught.value)


def test_a_misspelt_name_is_corrected(encoder: ChatTokenizer) -> None:
    with pytest.raises(TemplateError, match="neither a built-in template nor a file") as caught:
        resolve_template("alpacca", encoder)
    assert "did you mean   alpaca" in str(caught.value)


def test_a_file_is_read(encoder: ChatTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text("{{ messages[0].content }}")
    template = resolve_template(str(path), encoder)
    assert template.render(encoder, [Message("user", "hi")], prompt=True) == "hi"


def test_a_file_of_another_kind_is_refused(encoder: ChatTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "picture.jinja"
    path.write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(TemplateError, match="can't be read"):
        resolve_template(str(path), encoder)


def test_a_template_with_a_fault_says_which(encoder: ChatTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "broken.jinja"
    path.write_text("{% for m in messages %}")
    with pytest.raises(TemplateError, match="the chat template refuses this conversation"):
        resolve_template(str(path), encoder).render(encoder, [Message("user", "hi")], prompt=True)


def test_alpaca_words_instruction_and_input_apart(encoder: ChatTokenizer) -> None:
    turn = Message("user", "Add\n\n1 2", instruction="Add", input="1 2")
    text = resolve_template("alpaca", encoder).render(encoder, [turn], prompt=True)
    assert text.endswith("### Instruction:\nAdd\n\n### Input:\n1 2\n\n### Response:\n")
    assert "paired with an input" in text


@pytest.mark.parametrize("name", BUILT_IN)
def test_two_templates_have_two_digests(name: str) -> None:
    digests = {Template(other, BUILT_IN[other]).digest for other in BUILT_IN}
    assert len(digests) == len(BUILT_IN)
    assert Template(name, BUILT_IN[name]).digest in digests


@pytest.mark.parametrize("name", ["alpaca", "plain"])
def test_a_tool_s_turn_has_no_place_in_templates_without_one(name: str, encoder: ChatTokenizer) -> None:
    with pytest.raises(TemplateError, match="no place for the role tool"):
        resolve_template(name, encoder).render(encoder, [Message("tool", "{}")], prompt=True)


# ---- what a run adds to a template

SYSTEMS = (
    "Be brief.",
    "",
    'a "quoted" \\n \\ path\nand a line',
    "{{ 1 + 1 }} {% raw %} '%}' {#",
    "中文 😀 \t\x07\u2028é",
)


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("name", ["own", *BUILT_IN])
def test_a_default_system_message_is_the_one_that_is_put_in_front(
    name: str, system: str, encoder: ChatTokenizer
) -> None:
    template = Template(name, CHATML if name == "own" else BUILT_IN[name])
    theirs = Template(name, with_default_system(template.source, system))
    turn = Message("user", "hi", instruction="hi", input="")
    told = template.render(encoder, [Message("system", system), turn], prompt=True)
    assert theirs.render(encoder, [turn], prompt=True) == told
    other = [Message("system", "Mine."), turn]
    assert theirs.render(encoder, other, prompt=True) == template.render(encoder, other, prompt=True)


def test_without_a_system_message_the_template_stays_as_it_is() -> None:
    assert with_default_system(CHATML, None) is CHATML


@pytest.mark.parametrize(
    "start", ["", "\n", "\n\n", "  ", "  {% if true %}\nx{% endif %}", "{%- if true %}y{% endif %}"]
)
def test_what_is_put_in_front_changes_no_blank_of_the_template(start: str, encoder: ChatTokenizer) -> None:
    turns = [Message("system", "s"), Message("user", "hi")]
    plain = start + "{{ messages[-1].content }}"
    expected = Template("t", plain).render(encoder, turns, prompt=True)
    assert Template("t", with_default_system(plain, "z")).render(encoder, turns, prompt=True) == expected
    assert pin_date(Template("t", plain), "2024-07-06").render(encoder, turns, prompt=True) == expected


@pytest.mark.parametrize(
    ("code", "expected"),
    [("%d %b %Y", "06 Jul 2024"), ("%-d.%-m.%y", "6.7.24"), ("%F %T", "2024-07-06 00:00:00"),
     ("%B %e, %A", "July  6, Saturday"), ("%D %H:%M", "07/06/24 00:00")],
)  # fmt: skip
def test_a_date_that_the_template_tells_is_pinned(code: str, expected: str, encoder: ChatTokenizer) -> None:
    source = (
        "{%- if strftime_now is defined %}{%- set day = strftime_now('" + code + "') %}{%- endif %}"
        "{%- macro again() %}{{ strftime_now('" + code + "') }}{% endmacro %}"
        "{{ day + '|' + again() + '|' + messages[0].content }}"
    )
    template = Template("t", source)
    assert asks_for_date(template)
    pinned = pin_date(template, "2024-07-06")
    assert pinned.render(encoder, [Message("user", "hi")], prompt=True) == f"{expected}|{expected}|hi"
    assert not asks_for_date(pinned)
    assert pinned.digest != pin_date(template, "2024-07-07").digest


def test_a_template_without_a_date_asks_for_none() -> None:
    assert not asks_for_date(Template("own", CHATML))


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no template at {SHARED}")
def test_a_family_s_own_dated_template_is_pinned(encoder: ChatTokenizer) -> None:
    path = SHARED / "models" / "tokenizer_configs" / "gpt-oss-20b" / "tokenizer_config.json"
    own = Template("own", json.loads(path.read_text())["chat_template"])
    turns = [Message("user", "hi")]
    assert "Current date: 2024-07-06\n" in pin_date(own, "2024-07-06").render(encoder, turns, prompt=True)
    today = datetime.now().date().isoformat()
    assert pin_date(own, today).render(encoder, turns, prompt=True) == own.render(encoder, turns, prompt=True)
