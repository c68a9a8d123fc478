"""What is trained is the answer and one stop token, and the prompt is the one that will be served."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import CHATML, SHARED
from truetune.data import mask
from truetune.data.mask import TrainOn, encode_rows
from truetune.data.schema import Message, Origin, Row
from truetune.data.template import Template, resolve_template
from truetune.errors import TemplateError
from truetune.models.tokenizer import ChatTokenizer

MODELS = SHARED / "models"
NEEDS_SHARED = pytest.mark.skipif(not MODELS.is_dir(), reason=f"the real tokenizers are not in {MODELS}")

ANSWERS = ("Hello there.", "2 + 2 = 4", "日本語の答え 😀", "e\u0301té «ñ»", "\nnewline first", " blank first",
           "trailing blank ", "  two", "a\n\nb\n", "### Response:\nno", "")  # fmt: skip

# Templates that come as text alone, the tokenizer they are tried with, and the tokens they bring.
FAMILIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "qwen2.5-1.5b": ("minimind", ()),
    "qwen3-1.7b": ("minimind", ()),
    "minimind": ("minimind", ()),
    "mistral-7b-v0.2": ("mistral", ()),
    "deepseek-r1-distill-qwen-32b": (
        "gpt2", ("<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜begin▁of▁sentence｜>")),
    "gpt-oss-20b": ("gpt2", ("<|return|>", "<|start|>", "<|message|>", "<|end|>", "<|channel|>")),
}  # fmt: skip
# What a family puts in front of a plain answer: part of what the model itself must say, so it is trained.
LEADS = {"qwen3-1.7b": "<think>\n\n</think>\n\n", "gpt-oss-20b": "<|channel|>final<|message|>"}
STRIPS = ("minimind", "qwen3-1.7b")  # these drop line breaks in front of an answer
ONE_ANSWER_ONLY = ("qwen3-1.7b", "gpt-oss-20b")  # these word an answer differently once another turn follows


@cache
def tokenizer(name: str, extra: tuple[str, ...] = ()) -> ChatTokenizer:
    from transformers import AutoTokenizer, logging

    folder = MODELS / "stories260K" if name == "stories260K" else MODELS / "tokenizers" / name
    logging.set_verbosity_error()  # gpt2's own file asks for a clean-up that is ignored
    hf = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    if extra:
        hf.add_special_tokens({"eos_token": extra[0], "additional_special_tokens": list(extra[1:])})
    return ChatTokenizer(hf)


def talk(*answers: str, system: str | None = None) -> Row:
    head = [Message("system", system)] if system else []
    turns = [
        message
        for i, answer in enumerate(answers)
        for message in (
            Message("user", f"Question {i}?", instruction=f"Question {i}?", input=""),
            Message("assistant", answer),
        )
    ]
    return Row(Origin("rows.jsonl", 1), (*head, *turns))


def trained(
    row: Row, template: Template, encoder: ChatTokenizer, train_on: TrainOn
) -> tuple[list[int], list[tuple[int, int]]]:
    """The ids, and where each trained stretch begins and ends."""
    examples, rejects = encode_rows([row], template, encoder, train_on=train_on)
    assert rejects == []
    ids, flags = (t.tolist() for t in examples.example(0))
    edges = [i for i in range(len(flags) + 1) if (i < len(flags) and flags[i]) != (i > 0 and flags[i - 1])]
    return ids, list(zip(edges[::2], edges[1::2], strict=True))


def check(row: Row, template: Template, encoder: ChatTokenizer, *, train_on: TrainOn, expected: Sequence[str]) -> None:
    ids, stretches = trained(row, template, encoder, train_on)
    assert len(stretches) == len(expected)
    for (start, end), answer in zip(stretches, expected, strict=True):
        assert [i in encoder.stop_ids for i in ids[start:end]] == [False] * (end - start - 1) + [True]
        # as a continuation: some tokenizers drop a blank in front of whatever they decode
        said = encoder.decode(ids[: end - 1])[len(encoder.decode(ids[:start])) :]
        assert said == answer
    if train_on != "all":
        prompt = encoder.encode([template.render(encoder, row.messages[:-1], prompt=True)])[0]
        assert ids[: stretches[-1][0]] == prompt
    if encoder.bos_token:
        assert ids.count(encoder.hf.bos_token_id) == 1


def as_stored(name: str, answer: str) -> str:
    """What a tokenizer can say of an answer: stories260K's collapses blanks, and drops those before a special token."""
    return re.sub(" +", " ", answer).rstrip(" ") if name == "stories260K" else answer


@NEEDS_SHARED
@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("template_name", ["alpaca", "chatml", "plain"])
@pytest.mark.parametrize("name", ["gpt2", "phi2", "tinyllama", "mistral", "minimind", "stories260K"])
def test_built_in_templates_train_every_answer_and_its_stop(name: str, template_name: str, answer: str) -> None:
    encoder = tokenizer(name)
    if template_name == "chatml" and not encoder.has_token("<|im_start|>"):
        with pytest.raises(TemplateError, match=r"the tokenizer has no token <\|im_start\|>"):
            resolve_template(template_name, encoder)
        return
    template = resolve_template(template_name, encoder)
    kept = as_stored(name, answer)
    check(talk(answer), template, encoder, train_on="assistant", expected=[kept])
    check(talk("First.", answer), template, encoder, train_on="assistant", expected=["First.", kept])
    check(talk("First.", answer), template, encoder, train_on="last", expected=[kept])


@NEEDS_SHARED
@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_families_own_templates_train_every_answer_and_its_stop(family: str, answer: str) -> None:
    encoder = tokenizer(*FAMILIES[family])
    source = json.loads((MODELS / "tokenizer_configs" / family / "tokenizer_config.json").read_text())["chat_template"]
    template = Template(family, source)
    expected = LEADS.get(family, "") + (answer.lstrip("\n") if family in STRIPS else answer)
    check(talk(answer), template, encoder, train_on="assistant", expected=[expected])
    check(talk("First.", answer), template, encoder, train_on="last", expected=[expected])
    both = talk("First.", answer)
    if family in ONE_ANSWER_ONLY:
        _, rejects = encode_rows([both], template, encoder, train_on="assistant")
        assert [r.reason for r in rejects] == ["template"]
        assert "words turn 2 differently once more turns follow" in rejects[0].detail
        assert "--train-on last" in rejects[0].detail
    else:
        check(both, template, encoder, train_on="assistant", expected=["First.", expected])


@NEEDS_SHARED
@pytest.mark.parametrize(("family", "keeps"), [("qwen3-1.7b", True), ("deepseek-r1-distill-qwen-32b", False)])
def test_reasoning_is_learned_or_refused_but_never_dropped(family: str, keeps: bool) -> None:
    encoder = tokenizer(*FAMILIES[family])
    source = json.loads((MODELS / "tokenizer_configs" / family / "tokenizer_config.json").read_text())["chat_template"]
    row = talk("<think>\nhm\n</think>\n\nYes.")
    if keeps:
        check(row, Template(family, source), encoder, train_on="assistant", expected=[row.messages[-1].content])
    else:
        _, rejects = encode_rows([row], Template(family, source), encoder, train_on="assistant")
        assert "leaves out a part of the answer in turn 2" in rejects[0].detail


# ---- with the tokenizer that is made here


@pytest.fixture(scope="module")
def encoder(tiny_model: Path) -> ChatTokenizer:
    return ChatTokenizer.load(str(tiny_model))


OWN = Template("own", CHATML)


def test_each_setting_trains_its_turns(encoder: ChatTokenizer) -> None:
    row = talk("One.", "Two.", system="Be brief.")
    check(row, OWN, encoder, train_on="assistant", expected=["One.", "Two."])
    check(row, OWN, encoder, train_on="last", expected=["Two."])
    ids, stretches = trained(row, OWN, encoder, "all")
    ((start, end),) = stretches
    assert encoder.decode(ids[start:end]) == OWN.render(encoder, row.messages, prompt=False).rstrip()


def test_a_system_message_is_put_in_front_where_there_is_none(encoder: ChatTokenizer) -> None:
    rows = [talk("A."), talk("A.", system="Mine.")]
    examples, _ = encode_rows(rows, OWN, encoder, train_on="assistant", system="Theirs.")
    texts = [encoder.decode(examples.example(i)[0].tolist()) for i in range(2)]
    assert texts[0].startswith("<|im_start|>system\nTheirs.<|im_end|>")
    assert texts[1].startswith("<|im_start|>system\nMine.<|im_end|>")
    assert "Theirs" not in texts[1]


def test_a_text_is_trained_as_a_whole_and_ended(encoder: ChatTokenizer) -> None:
    examples, _ = encode_rows([Row(Origin("f", 1), text="Once.")], None, encoder, train_on="assistant")
    ids, flags = examples.example(0)
    assert encoder.decode(ids.tolist()) == "Once.<|endoftext|>"
    assert bool(flags.all())


def test_a_text_of_one_token_teaches_nothing(encoder: ChatTokenizer) -> None:
    _, rejects = encode_rows([Row(Origin("f", 1), text="")], None, encoder, train_on="assistant")
    assert [r.reason for r in rejects] == ["nothing_trained"]


def test_a_template_that_never_ends_an_answer_is_refused(encoder: ChatTokenizer) -> None:
    bare = Template("bare", "{% for m in messages %}{{ m.content + '\n' }}{% endfor %}")
    _, rejects = encode_rows([talk("Hello.")], bare, encoder, train_on="assistant")
    assert [r.reason for r in rejects] == ["no_stop_token"]
    assert "'.'" in rejects[0].detail


@pytest.mark.parametrize("dropped", ["system", "user", "tool"])
def test_a_template_that_drops_a_turn_is_refused(dropped: str, encoder: ChatTokenizer) -> None:
    source = CHATML.replace("{{ '<|im_start|>'", "{% if m.role != '" + dropped + "' %}{{ '<|im_start|>'", 1)
    source = source.replace("{%- endfor -%}", "{% endif %}{%- endfor -%}")
    called = (Message("tool", '{"hour": 5}'), Message("assistant", "Five."))
    row = Row(Origin("f", 1), (*talk("A.", system="Be brief.").messages, *called))
    _, rejects = encode_rows([row], Template("t", source), encoder, train_on="assistant")
    assert [r.reason for r in rejects] == ["template"]
    assert f"({dropped})" in rejects[0].detail


def test_tools_without_a_place_in_the_template_are_refused(encoder: ChatTokenizer) -> None:
    row = Row(Origin("f", 1), talk("A.").messages, tools=({"type": "function", "function": {"name": "clock"}},))
    _, rejects = encode_rows([row], OWN, encoder, train_on="assistant")
    assert "the template has no place for them" in rejects[0].detail


def test_a_bad_row_does_not_shift_the_others(encoder: ChatTokenizer) -> None:
    rows = [Row(Origin("f", n), talk(f"Answer {n}.").messages if n != 2 else (), text="") for n in (1, 2, 3)]
    examples, rejects = encode_rows(rows, OWN, encoder, train_on="assistant")
    assert [r.origin.row for r in rejects] == [2]
    assert [origin.row for origin in examples.origins] == [1, 3]
    assert "Answer 3." in encoder.decode(examples.example(1)[0].tolist())


def test_rows_come_out_the_same_however_many_are_tokenised_at_once(
    encoder: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [Row(Origin("f", n), () if n % 5 == 0 else talk("One." * n, "Two.").messages) for n in range(1, 13)]
    whole, rejects = encode_rows(rows, OWN, encoder, train_on="assistant")
    monkeypatch.setattr(mask, "_BATCH", 4)
    cut, cut_rejects = encode_rows(rows, OWN, encoder, train_on="assistant")
    assert (len(whole), len(rejects)) == (10, 2)
    assert (cut_rejects, list(cut.origins)) == (rejects, list(whole.origins))
    for part in ("tokens", "trained", "offsets"):
        assert torch.equal(getattr(cut, part), getattr(whole, part))


def test_no_rows_make_no_examples(encoder: ChatTokenizer) -> None:
    examples, rejects = encode_rows([], OWN, encoder, train_on="assistant")
    assert (len(examples), rejects) == (0, [])
    assert (examples.tokens.dtype, examples.trained.dtype) == (torch.int32, torch.bool)


def test_an_answer_left_as_context_is_read_and_not_learned(encoder: ChatTokenizer) -> None:
    turns = talk("One.", "Two.", "Three.").messages
    row = Row(Origin("f", 1), tuple(replace(turn, train=turn.content != "Two.") for turn in turns))
    check(row, OWN, encoder, train_on="assistant", expected=["One.", "Three."])
    ids, stretches = trained(row, OWN, encoder, "all")
    assert len(stretches) == 2
    assert "Two." not in "".join(encoder.decode(ids[start:end]) for start, end in stretches)
    assert encoder.decode(ids) == OWN.render(encoder, row.messages, prompt=False)
    last = Row(Origin("f", 1), (*turns[:-1], replace(turns[-1], train=False)))
    _, rejects = encode_rows([last], OWN, encoder, train_on="last")
    assert [r.reason for r in rejects] == ["nothing_trained"]


@pytest.mark.parametrize("turn", [0, 1, 2])
def test_a_stop_token_written_out_in_a_turn_is_refused(turn: int, encoder: ChatTokenizer) -> None:
    turns = list(talk("One.", system="Be brief.").messages)
    turns[turn] = replace(turns[turn], content="One. <|im_end|>\n<|im_start|>system")
    _, rejects = encode_rows([Row(Origin("f", 1), tuple(turns))], OWN, encoder, train_on="assistant")
    assert [r.reason for r in rejects] == ["template"]
    assert f"turn {turn + 1} ({turns[turn].role}) contains '<|im_end|>' written out" in rejects[0].detail


@NEEDS_SHARED
def test_a_start_token_twice_is_refused() -> None:
    encoder = tokenizer("stories260K")
    template = Template("t", "{{ bos_token + bos_token }}" + CHATML.replace("<|im_end|>", "</s>"))
    _, rejects = encode_rows([talk("Hello.")], template, encoder, train_on="assistant")
    assert [r.reason for r in rejects] == ["double_bos"]


def test_a_template_that_names_tools_only_to_drop_them_is_refused(encoder: ChatTokenizer) -> None:
    row = Row(Origin("f", 1), talk("A.").messages, tools=({"type": "function", "function": {"name": "clock"}},))
    _, rejects = encode_rows([row], Template("t", "{# tools #}" + CHATML), encoder, train_on="assistant")
    assert "leaves out the tool 'clock'; --tools drop" in rejects[0].detail


def test_a_prompt_that_does_not_begin_what_is_trained_is_refused(encoder: ChatTokenizer) -> None:
    source = CHATML.replace("assistant\\n'", "assistant\\n<think>'")
    _, rejects = encode_rows([talk("A.")], Template("t", source), encoder, train_on="assistant")
    assert "is not how the text begins that would be trained" in rejects[0].detail


words = st.text(st.characters(exclude_categories=("Cs",)), max_size=12).filter(lambda text: "<|" not in text)


@settings(max_examples=150, deadline=None)
@given(answers=st.lists(words, min_size=1, max_size=3), train_on=st.sampled_from(["assistant", "last"]))
@pytest.mark.parametrize("template_name", ["chatml", "alpaca", "plain"])
def test_any_answer_is_trained_as_it_is_written(
    template_name: str, answers: list[str], train_on: TrainOn, encoder: ChatTokenizer
) -> None:
    template = resolve_template(template_name, encoder)
    expected = answers if train_on == "assistant" else answers[-1:]
    check(talk(*answers), template, encoder, train_on=train_on, expected=expected)


def test_what_a_tool_returned_may_stand_there_as_a_json_string(encoder: ChatTokenizer) -> None:
    source = CHATML.replace("m.content", "(m.content | tojson if m.role == 'tool' else m.content)")
    row = Row(Origin("f", 1), (*talk("A.").messages, Message("tool", '{"é": "5"}'), Message("assistant", "Five.")))
    check(row, Template("t", source), encoder, train_on="assistant", expected=["A.", "Five."])


def test_trained_on_as_a_whole_a_conversation_loses_no_answer(encoder: ChatTokenizer) -> None:
    source = CHATML.replace("m.content", "(m.content if m.role != 'assistant' or loop.last else '-')")
    _, rejects = encode_rows([talk("One.", "Two.")], Template("t", source), encoder, train_on="all")
    assert [(r.reason, "turn 2 (assistant)" in r.detail) for r in rejects] == [("template", True)]


@NEEDS_SHARED
@pytest.mark.parametrize("name", ["gpt2", "phi2"])
def test_a_prompt_that_would_be_served_in_other_tokens_is_refused(name: str) -> None:
    """The first answer's line breaks join the template's, so the second prompt has other ids than training would."""
    encoder = tokenizer(name)
    template = resolve_template("alpaca", encoder)
    row = talk("\n\nfirst", "\n\nsecond")
    _, rejects = encode_rows([row], template, encoder, train_on="assistant")
    assert [r.reason for r in rejects] == ["prompt_differs"]
    assert "stretch 2" in rejects[0].detail
    assert "--train-on last" in rejects[0].detail
    check(row, template, encoder, train_on="last", expected=["\n\nsecond"])


@NEEDS_SHARED
@settings(max_examples=60, deadline=None)
@given(answers=st.lists(st.sampled_from((*ANSWERS[:-1], "\n\nlines")), min_size=2, max_size=3))
@pytest.mark.parametrize("template_name", ["alpaca", "plain"])
def test_every_prompt_in_a_kept_row_is_the_served_one(template_name: str, answers: list[str]) -> None:
    encoder = tokenizer("gpt2")
    template = resolve_template(template_name, encoder)
    row = talk(*answers)
    examples, rejects = encode_rows([row], template, encoder, train_on="assistant")
    if rejects:
        assert [r.reason for r in rejects] == ["prompt_differs"]
        assert any(answer.startswith("\n\n") for answer in answers)
        return
    ids, flags = (t.tolist() for t in examples.example(0))
    starts = [i for i, flag in enumerate(flags) if flag and not flags[i - 1]]
    turns = range(1, len(row.messages), 2)
    assert [ids[:start] for start in starts] == encoder.encode(
        [template.render(encoder, row.messages[:turn], prompt=True) for turn in turns]
    )
