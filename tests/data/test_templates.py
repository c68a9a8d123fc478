"""The named templates beside the families' own, and every real template on real chats and calls: sound, or refused."""

import json
from functools import cache
from typing import Any

import pytest

from conftest import SHARED
from truetune.data.formats import parse_rows
from truetune.data.mask import encode_rows
from truetune.data.read import read_rows
from truetune.data.schema import Message, Origin, Row
from truetune.data.template import Template, pin_date, resolve_template
from truetune.data.templates import BUILT_IN, needed_tokens
from truetune.errors import TemplateError
from truetune.models.tokenizer import ChatTokenizer

MODELS, DATA = SHARED / "models", SHARED / "data"
pytestmark = pytest.mark.skipif(not MODELS.is_dir(), reason=f"the real tokenizers are not in {MODELS}")

# What a template adds around the words of an answer that is learned.
AROUND = {"llama2": (" ", " "), "vicuna": (" ", "")}
TURNS = (Message("user", "Who are you?", instruction="Who are you?", input=""), Message("assistant", "A model."),
         Message("user", "Why?", instruction="Why?", input=""), Message("assistant", "By\nchance 😀"))  # fmt: skip
CALL = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "Größe", "deep": [1, {"a": "b"}]}}}
CLOCK = {"type": "function", "function": {"name": "clock", "description": "Tells the time.",
                                          "parameters": {"type": "object", "properties": {}}}}  # fmt: skip
CALLING = (Message("user", "What time is it?"), Message("assistant", "", tool_calls=(CALL,)),
           Message("tool", '{"hour": 5}', name="clock"), Message("assistant", "Five."))  # fmt: skip


@cache
def tokenizer(name: str, tokens: tuple[str, ...] = (), end: str = "") -> ChatTokenizer:
    from transformers import AutoTokenizer, logging

    logging.set_verbosity_error()  # gpt2's own file asks for a clean-up that is ignored
    hf = AutoTokenizer.from_pretrained(str(MODELS / "tokenizers" / name), local_files_only=True)
    added: dict[str, Any] = {"additional_special_tokens": list(tokens)} | ({"eos_token": end} if end else {})
    if tokens:
        hf.add_special_tokens(added)
    return ChatTokenizer(hf)


def own(family: str) -> Template:
    source = json.loads((MODELS / "tokenizer_configs" / family / "tokenizer_config.json").read_text())["chat_template"]
    return pin_date(Template(family, source), "2026-01-01")


def row(turns: tuple[Message, ...], **more: Any) -> Row:
    return Row(Origin("x", 1), turns, **more)


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_named_template_trains_every_answer_up_to_its_stop(name: str) -> None:
    wanted = needed_tokens(name)
    encoder = tokenizer("gpt2", wanted, wanted[-1] if name in ("llama2", "deepseek") else "")
    template = resolve_template(name, encoder)
    before, after = AROUND.get(name, ("", ""))
    # gpt2's tokenizer, unlike llama3's, words two line breaks in other tokens once a letter follows.
    turns = TURNS[:2] if name == "llama3" else TURNS
    for row_of in (turns, (Message("system", "Be brief."), *turns)):
        examples, rejects = encode_rows([row(row_of)], template, encoder, train_on="assistant")
        assert rejects == []
        ids, flags = (t.tolist() for t in examples.example(0))
        learned = [i for i, flag in zip(ids, flags, strict=True) if flag]
        stops = [i for i in learned if i in encoder.stop_ids]
        assert len(stops) == len(turns) // 2
        said = encoder.decode(learned)
        for stop in set(stops):
            said = said.replace(encoder.decode([stop]), "|")
        assert said == "".join(f"{before}{turn.content}{after}|" for turn in turns if turn.role == "assistant")


@pytest.mark.parametrize("name", [name for name in BUILT_IN if needed_tokens(name)])
def test_a_family_s_template_wants_its_family_s_tokens(name: str) -> None:
    with pytest.raises(TemplateError, match=f"--template {name}: the tokenizer has no token"):
        resolve_template(name, tokenizer("gpt2"))


@pytest.mark.parametrize("name", [name for name in BUILT_IN if name != "qwen"])
def test_what_a_named_template_has_no_place_for_is_refused(name: str) -> None:
    encoder = tokenizer("gpt2", needed_tokens(name))
    template = Template(name, BUILT_IN[name])
    _, rejects = encode_rows([row(CALLING, tools=(CLOCK,))], template, encoder, train_on="assistant")
    assert "no place for them; --tools drop" in rejects[0].detail
    _, rejects = encode_rows([row(CALLING)], template, encoder, train_on="assistant")
    assert [r.reason for r in rejects] == ["template"]
    thought = (TURNS[0], Message("assistant", "Yes.", reasoning="hm"))
    _, rejects = encode_rows([row(thought)], template, encoder, train_on="assistant")
    assert "(its reasoning), so it would not be learned; --thinking drop" in rejects[0].detail


@pytest.mark.parametrize(
    ("name", "family", "quirk"),
    [("qwen", "qwen2.5-1.5b", ""), ("deepseek", "deepseek-r1-distill-qwen-32b", ""),
     ("mistral", "mistral-7b-v0.2", "'<s>'")],
)  # fmt: skip
@pytest.mark.parametrize("prompt", [True, False])
def test_a_named_template_says_what_its_family_s_own_says(name: str, family: str, quirk: str, prompt: bool) -> None:
    encoder = tokenizer("gpt2", (*needed_tokens(name), "</s>"), "</s>")
    ours, theirs = Template(name, BUILT_IN[name]), own(family)
    bos = "<|endoftext|>" if name == "deepseek" else ""  # which resolve_template puts in front
    chats: list[tuple[tuple[Message, ...], tuple[Any, ...]]] = [(TURNS, ()), (TURNS[:1], ())]
    if name == "qwen":
        chats += [(CALLING, (CLOCK,)), ((Message("system", "s"), *CALLING), (CLOCK,)), (CALLING[:3], ())]
    if name != "mistral":
        chats += [((Message("system", "s"), *TURNS), ())]
    for turns, tools in chats:
        said = ours.render(encoder, turns, tools=tools, prompt=prompt)
        assert bos + said == theirs.render(encoder, turns, tools=tools, prompt=prompt).removeprefix(quirk)


# ---- every real template on the real chats

FAMILIES = {
    "qwen2.5-1.5b": ("minimind", (), ""),
    "qwen3-1.7b": ("minimind", (), ""),
    "minimind": ("minimind", (), ""),
    "mistral-7b-v0.2": ("mistral", (), ""),
    "deepseek-r1-distill-qwen-32b": ("gpt2", ("<｜User｜>", "<｜Assistant｜>"), "<｜end▁of▁sentence｜>"),
    "gpt-oss-20b": ("gpt2", ("<|start|>", "<|message|>", "<|end|>", "<|channel|>", "<|call|>"), "<|return|>"),
}
FILES = (
    "oasst_fr_top1.jsonl",
    "fastchat_dummy_conversation.json",
    "glaive_toolcall_en.json",
    "glaive_toolcall_zh.json",
)
REASONS = ("the template leaves out", "the template words turn", "the chat template refuses", "the answer ends in",
           "the row brings tools", "the prompt that the template makes", "trained stretch", "contains ")  # fmt: skip


def test_every_real_template_is_under_test() -> None:
    assert {path.name for path in (MODELS / "tokenizer_configs").iterdir()} == set(FAMILIES)


@cache
def rows_of(name: str) -> list[Row]:
    rows, rejects = parse_rows(read_rows([str(DATA / name)])[0][:40], "auto")
    assert rejects == []
    return rows


@pytest.mark.parametrize("train_on", ["assistant", "last"])
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_is_sound_or_refused_with_the_reason(family: str, file: str, train_on: Any) -> None:
    encoder, template, rows = tokenizer(*FAMILIES[family]), own(family), rows_of(file)
    examples, rejects = encode_rows(rows, template, encoder, train_on=train_on)
    assert len(examples) + len(rejects) == len(rows)
    assert [r.detail for r in rejects if not r.detail.startswith(REASONS)] == []
    assert len(examples) or train_on == "assistant"
    by_number = {each.origin.row: each for each in rows}
    for index, origin in enumerate(examples.origins):
        ids, flags = (t.tolist() for t in examples.example(index))
        ends = [i for i, flag in enumerate(flags) if flag and (i + 1 == len(flags) or not flags[i + 1])]
        assert all(ids[end] in encoder.stop_ids for end in ends)
        turns = by_number[origin.row].messages
        answers = [n for n, turn in enumerate(turns) if turn.role == "assistant"]
        assert len(ends) == (1 if train_on == "last" else len(answers))
        start = flags.index(True)  # of the first answer that is learned
        before = turns[: answers[0] if train_on == "assistant" else answers[-1]]
        tools = by_number[origin.row].tools
        assert ids[:start] == encoder.encode([template.render(encoder, before, tools=tools, prompt=True)])[0]


def test_calls_of_a_family_that_knows_them_are_learned_in_its_words() -> None:
    encoder, template = tokenizer("minimind"), own("qwen3-1.7b")
    examples, rejects = encode_rows([row(CALLING[:2], tools=(CLOCK,))], template, encoder, train_on="assistant")
    assert rejects == []
    ids, flags = (t.tolist() for t in examples.example(0))
    said = encoder.decode([i for i, flag in zip(ids, flags, strict=True) if flag])
    assert said.endswith(
        '{"name": "clock", "arguments": {"zone": "Größe", "deep": [1, {"a": "b"}]}}\n</tool_call><|im_end|>'
    )


def test_a_template_that_wants_arguments_as_text_gets_them() -> None:
    encoder = tokenizer(*FAMILIES["deepseek-r1-distill-qwen-32b"])
    source = (
        "{% for m in messages %}{% if m.tool_calls %}{{ m.tool_calls[0].function.name + ' ' + "
        "m.tool_calls[0].function.arguments }}{% else %}{{ m.content }}{% endif %}{{ eos_token }}{% endfor %}"
    )
    examples, rejects = encode_rows([row(CALLING)], Template("t", source), encoder, train_on="assistant")
    assert rejects == []
    assert 'clock {"zone": "Größe"' in encoder.decode(examples.example(0)[0].tolist())


@pytest.mark.parametrize("family", ["qwen3-1.7b", "gpt-oss-20b"])
def test_reasoning_apart_from_the_answer_is_learned_where_the_family_has_a_place(family: str) -> None:
    encoder, template = tokenizer(*FAMILIES[family]), own(family)
    thought = (TURNS[0], Message("assistant", "Yes.", reasoning="Let me see."))
    examples, rejects = encode_rows([row(thought)], template, encoder, train_on="assistant")
    assert rejects == []
    ids, flags = (t.tolist() for t in examples.example(0))
    said = encoder.decode([i for i, flag in zip(ids, flags, strict=True) if flag])
    assert said.index("Let me see.") < said.index("Yes.")
