"""The tokenizer as the data layer sees it: nothing added, everything decoded, stop tokens known."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from truetune.errors import ModelError, TemplateError
from truetune.models.names import is_local
from truetune.models.tokenizer import ChatTokenizer

SHARED = Path(__file__).resolve().parents[3] / "shared" / "models"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no models at {SHARED}")


@needs_shared
def test_the_recorded_ids_are_found_again() -> None:
    tokenizer = ChatTokenizer.load(str(SHARED / "stories260K"))
    cases = json.loads((SHARED / "stories260K" / "golden.json").read_text(encoding="utf-8"))["tokenizer_cases"]
    assert len(cases) == 15
    for case in cases:
        start, *ids = case["ids"]
        assert start == 1
        assert tokenizer.encode([case["text"]])[0] == ids
        assert tokenizer.encode([tokenizer.bos_token + case["text"]])[0] == case["ids"]


@needs_shared
def test_a_start_token_is_known_where_the_tokenizer_adds_one() -> None:
    tokenizer = ChatTokenizer.load(str(SHARED / "stories260K"))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.own_template) == ("<s>", "</s>", None)
    assert tokenizer.stop_ids == {1, 2}  # its generation settings name both


def test_turn_ends_of_the_vocabulary_are_stop_tokens(tiny_model: Path) -> None:
    tokenizer = ChatTokenizer.load(str(tiny_model))
    assert tokenizer.bos_token == ""
    assert {tokenizer.decode([i]) for i in tokenizer.stop_ids} == {"<|endoftext|>", "<|im_end|>"}


def test_any_text_survives_encoding(tiny_model: Path) -> None:
    tokenizer = ChatTokenizer.load(str(tiny_model))
    texts = ["", " two  blanks ", "Größe 中文 🙂\r\n\t", "<|im_start|>user\nhi<|im_end|>"]
    assert [tokenizer.decode(ids) for ids in tokenizer.encode(texts)] == texts
    assert tokenizer.encode([]) == []


def test_of_several_templates_the_default_is_the_own(make_tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_tiny(tmp_path / "model", chat_template={"default": "D{{ messages }}", "tool_use": "T"})
    assert ChatTokenizer.load(str(folder)).own_template == "D{{ messages }}"


def test_a_template_that_refuses_is_quoted(tiny_model: Path) -> None:
    tokenizer = ChatTokenizer.load(str(tiny_model))
    with pytest.raises(TemplateError, match="roles must alternate"):
        tokenizer.render(
            [{"role": "user", "content": "a"}],
            "{{ raise_exception('roles must alternate') }}",
            tools=None,
            prompt=False,
        )


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ModelError, match="has no tokenizer"):
        ChatTokenizer.load(str(tmp_path))


def test_a_name_is_a_folder_or_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    assert not is_local("org/model")
    assert all(is_local(name) for name in ("models/gone", "./org/model", "~/m", "plain", "a/b/c", "models"))


@pytest.mark.parametrize(
    "source",
    ["{{ messages[9].content.x }}", "{{ 1 / 0 }}", "{{ messages[0]['content'] | int + 'a' }}", "{{ messages.pop() }}",
     "{{ ''.join([1]) }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ nothing() }}"],
)  # fmt: skip
def test_a_template_that_fails_in_any_way_is_a_user_s_mistake(source: str, tiny_model: Path) -> None:
    tokenizer = ChatTokenizer.load(str(tiny_model))
    with pytest.raises(TemplateError, match=r"the chat template refuses this conversation: \S"):
        tokenizer.render([{"role": "user", "content": "a"}], source, tools=None, prompt=False)


def test_the_same_files_make_the_same_tokenizer_wherever_they_lie(tiny_model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    identity = ChatTokenizer.load(str(tiny_model)).identity
    assert identity is not None
    assert ChatTokenizer.load(str(copy)).identity == identity
    (copy / "model.safetensors").write_bytes(b"other weights")
    assert ChatTokenizer.load(str(copy)).identity == identity
    (copy / "additional_chat_templates").mkdir()
    (copy / "additional_chat_templates" / "tool_use.jinja").write_text("T")
    assert ChatTokenizer.load(str(copy)).identity != identity


def test_a_tokenizer_without_files_has_no_identity(tiny_model: Path) -> None:
    assert ChatTokenizer(ChatTokenizer.load(str(tiny_model)).hf).identity is None
