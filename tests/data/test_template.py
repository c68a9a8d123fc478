"""Which template is meant, and what is said when none is."""

from pathlib import Path

import pytest

from conftest import CHATML
from truetune.data.schema import Message
from truetune.data.template import BUILT_IN, resolve_template
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
def test_two_templates_have_two_digests(name: str, encoder: ChatTokenizer) -> None:
    digests = {resolve_template(other, encoder).digest for other in BUILT_IN}
    assert len(digests) == len(BUILT_IN)
    assert resolve_template(name, encoder).digest == resolve_template(name, encoder).digest


@pytest.mark.parametrize("name", ["alpaca", "plain"])
def test_a_tool_s_turn_has_no_place_in_templates_without_one(name: str, encoder: ChatTokenizer) -> None:
    with pytest.raises(TemplateError, match="no place for the role tool"):
        resolve_template(name, encoder).render(encoder, [Message("tool", "{}")], prompt=True)
