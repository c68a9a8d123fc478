import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from truetune.data.formats import FORMATS, Choice, detect, parse_rows
from truetune.data.formats.checks import is_blank
from truetune.data.formats.chosen import parse_preference
from truetune.data.formats.columns import parse_columns
from truetune.data.rejects import Rejects, counts, raise_if_too_many, write_rejects
from truetune.data.schema import Message, Origin, RawRow, Reject, Row
from truetune.errors import ConfigError, DataError

F_TOOL = {"type": "function", "function": {"name": "f"}}


def raws(*values: Any, file: str = "x.jsonl") -> list[RawRow]:
    return [RawRow(Origin(file, number), value) for number, value in enumerate(values, start=1)]


def one(value: Any) -> Row:
    rows, rejects = parse_rows(raws(value), "auto")
    assert rejects == []
    return rows[0]


def reject(value: Any, name: str) -> tuple[str, str]:
    rows, rejects = parse_rows(raws(value), name)
    assert (rows, len(rejects)) == ([], 1)
    return rejects[0].reason, rejects[0].detail


def chat(*turns: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def share(*turns: tuple[str, str], **more: Any) -> dict[str, Any]:
    return {"conversations": [{"from": who, "value": text} for who, text in turns], **more}


def turn_with(role: str = "assistant", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "a"}, {"role": role, "content": "b", **more}]}


def said(row: Row) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in row.messages]


def test_alpaca_without_input_is_the_instruction_alone() -> None:
    row = one({"instruction": " Do \r\n", "input": "", "output": " done\n"})
    assert row.messages == (
        Message("user", " Do \r\n", instruction=" Do \r\n", input=""),
        Message("assistant", " done\n"),
    )


def test_alpaca_with_input_joins_and_keeps_both() -> None:
    row = one({"instruction": "Add.", "input": "1 ", "output": "1"})
    assert row.messages[0] == Message("user", "Add.\n\n1 ", instruction="Add.", input="1 ")


def test_alpaca_history_and_system_come_first() -> None:
    row = one({"instruction": "c", "output": "d", "history": [["a", "b"]], "system": "s"})
    assert said(row) == [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    assert row.messages[1] == Message("user", "a", instruction="a", input="")


@pytest.mark.parametrize(
    "value",
    [
        {"instruction": "a", "input": "b", "response": "c"},
        {"instruction": "a", "context": "b", "response": "c", "category": "qa"},
        {"instruction": "a", "instances": [{"input": "b", "output": "c"}], "id": "x"},
        {"instruction": "a", "input": "b", "output": "c", "text": "a rendered copy"},
    ],
    ids=["gpteacher", "dolly", "self-instruct", "stanford"],
)
def test_spellings_of_alpaca(value: dict[str, Any]) -> None:
    assert said(one(value)) == [("user", "a\n\nb"), ("assistant", "c")]


def test_null_in_an_optional_field_means_absent() -> None:
    row = one({"instruction": "a", "input": None, "output": "b", "history": None, "system": None})
    assert said(row) == [("user", "a"), ("assistant", "b")]


def test_sharegpt_roles_become_ours() -> None:
    call = '{"name": "f", "arguments": {}}'
    turns = [("human", "a"), ("function_call", call), ("observation", "c"), ("gpt", "d"), ("user", "e"), ("bard", "f")]
    row = one(share(*turns, system="s"))
    assert [role for role, _ in said(row)] == ["system", "user", "assistant", "tool", "assistant", "user", "assistant"]


@pytest.mark.parametrize(
    "tools",
    [[{"name": "f"}], '[{"name": "f"}]', [{"type": "function", "function": {"name": "f", "strict": None}}]],
    ids=["bare", "text", "wrapped"],
)
def test_tools_have_one_form_in_the_end(tools: object) -> None:
    assert one(share(("human", "a"), ("gpt", "b"), tools=tools)).tools == (F_TOOL,)


@pytest.mark.parametrize("tools", ["", "[]", [], None])
def test_no_tools_in_any_spelling(tools: object) -> None:
    assert one(share(("human", "a"), ("gpt", "b"), tools=tools)).tools == ()


def test_messages_are_kept_as_they_are() -> None:
    turns = [("system", "s"), ("user", " a\n"), ("assistant", "\tc"), ("tool", "t"), ("assistant", "b ")]
    assert said(one(chat(*turns))) == turns


@pytest.mark.parametrize(
    ("prompt", "answer"), [("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("text", "code")]
)
def test_pairs_of_prompt_and_completion(prompt: str, answer: str) -> None:
    value = {prompt: "a ", answer: " b"}
    assert (detect(raws(value)), said(one(value))) == ("prompt-completion", [("user", "a "), ("assistant", " b")])


@pytest.mark.parametrize("column", ["text", "content", "quote"])
def test_spellings_of_a_text(column: str) -> None:
    assert one({column: " a\n", "author": "b"}).text == " a\n"


def test_either_form_of_turns_may_stand_in_either_list() -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert said(one({"conversations": turns})) == [("user", "a"), ("assistant", "b")]
    assert said(one({"conversation": turns})) == [("user", "a"), ("assistant", "b")]
    theirs = [{"from": "human", "value": "a"}, {"from": "chatgpt", "value": "b"}]
    assert said(one({"messages": theirs})) == [("user", "a"), ("assistant", "b")]


def test_parts_of_text_are_joined_as_they_stand() -> None:
    row = one(chat(("user", [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}, "c"]), ("assistant", "d")))
    assert said(row) == [("user", "a bc"), ("assistant", "d")]


@pytest.mark.parametrize(
    "call",
    [
        {"tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": [1]}'}}]},
        {"tool_calls": '[{"id": "1", "name": "f", "arguments": {"x": [1]}}]'},
    ],
)
def test_openai_s_calls_and_results(call: dict[str, Any]) -> None:
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, **call},
        {"role": "tool", "content": "7", "tool_call_id": "1", "name": "f"},
        {"role": "assistant", "content": "b", "reasoning_content": "hm"},
    ]
    row = one({"messages": turns, "tools": [F_TOOL]})
    expected = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": [1]}}}
    assert row.messages[1:] == (
        Message("assistant", "", tool_calls=(expected,)),
        Message("tool", "7", name="f", call_id="1"),
        Message("assistant", "b", reasoning="hm"),
    )


def test_the_older_form_of_a_call() -> None:
    call = {"name": "f", "arguments": '{"x": 1}'}
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "function_call": call},
             {"role": "function", "name": "f", "content": "7"}]  # fmt: skip
    row = one({"messages": turns})
    assert row.messages[1].tool_calls == ({"type": "function", "function": {"name": "f", "arguments": {"x": 1}}},)
    assert row.messages[2].role == "tool"


def test_a_call_of_sharegpt_may_be_several() -> None:
    calls = [{"name": "f", "arguments": {}}, {"name": "g", "arguments": {"x": "1"}}]
    row = one(share(("human", "a"), ("tool_call", json.dumps(calls)), ("observation", "c")))
    assert [call["function"]["name"] for call in row.messages[1].tool_calls] == ["f", "g"]


@pytest.mark.parametrize("flag", [{"weight": 0}, {"train": False}, {"training": False}, {"loss": 0}])
def test_an_answer_may_be_left_as_context(flag: dict[str, Any]) -> None:
    turns = [{"role": "user", "content": "a", "weight": 0}, {"role": "assistant", "content": "b", **flag},
             {"role": "user", "content": "c"}, {"role": "assistant", "content": "d", "weight": 1}]  # fmt: skip
    assert [m.train for m in one({"messages": turns}).messages if m.role == "assistant"] == [False, True]


def test_prompt_and_completion_may_be_turns_and_the_prompt_s_answers_are_context() -> None:
    prompt = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    for completion in ("d", {"role": "assistant", "content": "d"}, [{"role": "assistant", "content": "d"}]):
        row = one({"prompt": prompt, "completion": completion})
        assert said(row)[-1] == ("assistant", "d")
        assert [m.train for m in row.messages if m.role == "assistant"] == [False, True]


def test_a_system_prompt_beside_a_pair() -> None:
    row = one({"system_prompt": "s", "question": "a", "response": "b", "id": 1})
    assert said(row) == [("system", "s"), ("user", "a"), ("assistant", "b")]


def test_a_null_column_is_no_column() -> None:
    row = one({"messages": None, "prompt": "a", "completion": "b", "response": None})
    assert said(row) == [("user", "a"), ("assistant", "b")]


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ({**chat(("user", "a")), "problem": "a", "solution": "b"}, "messages and prompt-completion"),
        ({**chat(("user", "a")), "conversations": []}, "messages and sharegpt"),
        ({"instruction": "a", "output": "b", "question": "a", "answer": "b"}, "alpaca and prompt-completion"),
    ],
)
def test_columns_that_fit_two_formats_are_not_guessed_at(value: dict[str, Any], names: str) -> None:
    with pytest.raises(DataError, match=f"x.jsonl, row 1: its columns fit {names}"):
        parse_rows(raws(value), "auto")


def test_a_named_format_settles_what_columns_leave_open() -> None:
    value = {"instruction": "a", "output": "b", "question": "c", "answer": "d"}
    rows, rejects = parse_rows(raws(value), "prompt-completion")
    assert (said(rows[0]), rejects) == ([("user", "c"), ("assistant", "d")], [])


anything = st.text(max_size=20).filter(lambda text: not is_blank(text))


@given(st.lists(st.tuples(anything, anything), min_size=1, max_size=4), st.one_of(st.just(""), anything))
def test_a_conversation_is_the_same_in_every_form(pairs: list[tuple[str, str]], system: str) -> None:
    turns = [turn for asked, told in pairs for turn in (("user", asked), ("assistant", told))]
    head = [("system", system)] if system else []
    forms: list[dict[str, Any]] = [
        chat(*head, *turns),
        {"conversation": chat(*turns)["messages"], "system": system},
        share(*[({"user": "human", "assistant": "gpt"}[role], text) for role, text in turns], system=system or None),
        {"messages": [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in [*head, *turns]]},
    ]
    for form in forms:
        assert said(one(form)) == [*head, *turns]
    last = {"prompt": chat(*head, *turns[:-1])["messages"], "completion": turns[-1][1]}
    assert said(one(last)) == [*head, *turns]
    history = {"instruction": turns[-2][1], "output": turns[-1][1], "history": [list(pair) for pair in pairs[:-1]]}
    assert said(one(history | {"system": system})) == [*head, *turns]


# ---- preference rows


PREFERRED = [
    {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"},
     "rejected": {"from": "gpt", "value": "b"}},
    {"prompt": "q", "chosen": "a", "rejected": "b"},
    {"question": "q", "response_j": "a", "response_k": "b"},
    {"prompt": "q", "chosen": chat(("user", "q"), ("assistant", "a"))["messages"],
     "rejected": chat(("user", "q"), ("assistant", "b"))["messages"]},
    {"prompt": chat(("user", "q"))["messages"], "chosen": chat(("assistant", "a"))["messages"],
     "rejected": chat(("assistant", "b"))["messages"]},
]  # fmt: skip


@pytest.mark.parametrize("value", PREFERRED, ids=["sharegpt", "texts", "stack-exchange", "whole", "turns"])
def test_preference_rows_of_every_form_are_understood(value: dict[str, Any]) -> None:
    (raw,) = raws(value)
    found = parse_preference(raw)
    assert (found.prompt, found.chosen, found.rejected) == (
        (Message("user", "q"),), (Message("assistant", "a"),), (Message("assistant", "b"),))  # fmt: skip
    with pytest.raises(DataError, match="--format chosen"):
        parse_rows([raw], "auto")
    rows, rejects = parse_rows([raw], "chosen")
    assert (said(rows[0]), rejects) == ([("user", "q"), ("assistant", "a")], [])


def test_a_judged_answer_is_learned_when_it_is_a_good_one() -> None:
    turns = chat(("user", "q"), ("assistant", "first"), ("user", "r"), ("assistant", "a"))
    rows, rejects = parse_rows(raws({**turns, "label": True}, {**turns, "label": False}), "chosen")
    assert [m.train for m in rows[0].messages if m.role == "assistant"] == [False, True]
    assert [each.reason for each in rejects] == ["worse_answer"]


# ---- columns by other names


def test_columns_are_read_under_their_field_s_name() -> None:
    rows, rejects = parse_rows(raws({"q": "a", "a": "b", "prompt": None}), "auto",
                               columns=parse_columns(["prompt=q, completion=a"]))  # fmt: skip
    assert (said(rows[0]), rejects) == ([("user", "a"), ("assistant", "b")], [])


def test_two_columns_may_change_places() -> None:
    rows, _ = parse_rows(raws({"question": "a", "answer": "b"}), "auto",
                         columns=parse_columns(["question=answer", "answer=question"]))  # fmt: skip
    assert said(rows[0]) == [("user", "b"), ("assistant", "a")]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["prompt"], r"'prompt'[\s\S]*FIELD=COLUMN"),
        (["promt=q"], r"no format has a field 'promt'[\s\S]*did you mean\s+prompt=q"),
        (["prompt=q", "prompt=r"], "given twice: q, r"),
    ],
)
def test_a_faulty_mapping_says_why(settings: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_columns(settings)


def test_a_mapped_column_that_is_nowhere_names_the_nearest() -> None:
    with pytest.raises(DataError, match=r"x.jsonl: no column 'qestion'[\s\S]*did you mean\s+prompt=question"):
        parse_rows(raws({"question": "a", "x": "b"}), "auto", columns={"prompt": "qestion"})


def test_a_field_that_is_taken_is_a_fault_of_the_row() -> None:
    values = {"prompt": "a", "completion": "b"}, {"prompt": "a", "q": "c", "completion": "b"}
    rows, rejects = parse_rows(raws(*values), "auto", columns={"prompt": "q"})
    assert (len(rows), [(each.origin.row, each.reason) for each in rejects]) == (1, [(2, "column_taken")])


def test_blocks_of_one_file_follow_its_first() -> None:
    choices: dict[str, Choice] = {}
    values = raws({"text": "a"}, {"text": "b"}, {"prompt": "a", "completion": "b"})
    found = [parse_rows([value], "auto", choices=choices) for value in values]
    assert parse_rows(values, "auto") == ([row for rows, _ in found for row in rows], found[-1][1])
    assert "row 1 set the format" in found[-1][1][0].detail


def test_text_has_no_messages() -> None:
    row = one({"text": " a\n"})
    assert (row.text, row.messages) == (" a\n", ())


@pytest.mark.parametrize(
    ("value", "name", "reason", "words"),
    [
        ("a", "text", "not_an_object", "the row is text"),
        ({"text": " "}, "text", "empty_text", "white space only"),
        ({"text": "\ufeff \u200b"}, "text", "empty_text", "white space only"),
        ({"instruction": "a", "output": "\u200b\n\u200b"}, "alpaca", "empty_output", "white space only"),
        ({"prompt": "a", "Completion": "b"}, "prompt-completion", "missing_field", "is `Completion` meant?"),
        ({"prompt": [{}], "completion": "b"}, "prompt-completion", "missing_field", "message 1: `role` is missing"),
        ({"question": "a"}, "prompt-completion", "missing_field", "`answer` is missing"),
        ({"instruction": "a", "output": True}, "alpaca", "wrong_type", "`output` is true"),
        ({"instruction": "a", "output": "b", "input": 1}, "alpaca", "wrong_type", "`input` is a number"),
        ({"instruction": "a", "output": "b", "history": [["q"]]}, "alpaca", "wrong_type", "turn 1: a pair"),
        ({"instruction": "a", "output": "b", "history": [["q", ""]]}, "alpaca", "empty_output", "`history` turn 1"),
        ({"instruction": "a", "input": "b", "context": "c", "output": "d"}, "alpaca", "two_inputs", "keep one"),
        ({"instruction": "a", "instances": [{}, {}]}, "alpaca", "wrong_type", "`instances` holds 2"),
        ({"messages": []}, "messages", "empty_messages", "`messages` is an empty list"),
        ({"messages": "[]"}, "messages", "wrong_type", "CSV, which can't hold lists"),
        ({"messages": ["hi"]}, "messages", "not_an_object", "message 1 is text"),
        (chat(("user", "a"), ("assistant", " \n")), "messages", "empty_output", "every assistant message"),
        (
            chat(("user", "a"), ("assistant", " "), ("user", "b"), ("assistant", "c")),
            "messages",
            "empty_output",
            "message 2: the answer is empty",
        ),
        (chat(("user", "a"), ("assistant", None)), "messages", "wrong_type", "message 2: `content` is null"),
        (chat(("user", [{"type": "image_url"}])), "messages", "media", "`content` has a part of type 'image_url'"),
        (chat(("User", "a"), ("human", "b")), "messages", "unknown_role", "perhaps 'user' is meant by 'User'"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"from": "gpt", "value": "b"}]},
            "messages",
            "ambiguous",
            "mixes turns",
        ),
        (
            {"messages": [{"role": "assistant", "content": "a", "weight": 0}]},
            "messages",
            "nothing_trained",
            "every answer is marked",
        ),
        (turn_with(weight=0.5), "messages", "unsupported_key", "`weight` is 0.5; 0 or 1"),
        (turn_with(weight=0, train=True), "messages", "ambiguous", "`train`, `weight` say different things"),
        (turn_with(role="user", weight=1), "messages", "unsupported_key", "would train a turn of the user"),
        (
            turn_with(role="user", reasoning_content="hm"),
            "messages",
            "unsupported_key",
            "reasoning in a turn of the user",
        ),
        (turn_with(reasoning="a", thinking="b"), "messages", "ambiguous", "there twice and differs"),
        (turn_with(audio={"id": 1}), "messages", "unsupported_key", "`audio` is not understood"),
        (turn_with(tool_calls=[{"id": 1}]), "messages", "bad_tool_call", "entry 1: an object of `name`"),
        (turn_with(tool_calls=3), "messages", "bad_tool_call", "`tool_calls` is a number"),
        (turn_with(tool_calls="[{"), "messages", "bad_tool_call", "is text, but not valid JSON"),
        (turn_with(function_call={"name": "f", "arguments": "{"}), "messages", "bad_tool_call", "`arguments` is text"),
        (turn_with(function_call={"name": "f", "arguments": [1]}), "messages", "bad_tool_call", "is a list of 1"),
        (share(("human", "a"), ("function_call", "b")), "sharegpt", "bad_tool_call", "message 2: `value` is text, but"),
        (share(("human", "a"), ("gpt", "b"), tools=[{}]), "sharegpt", "bad_tools", "entry 1 has no name"),
        ({"prompt": "a", "completion": "b", "response": "c"}, "prompt-completion", "ambiguous", "--columns says which"),
        ({"instruction": "a", "output": "b", "response": "c"}, "alpaca", "ambiguous", "both there and differ"),
        ({"text": "a", "content": "b"}, "text", "ambiguous", "--columns text=content"),
        ({"text": "a", "system": "s", "code": "c", "system_prompt": "t"}, "prompt-completion", "ambiguous", "keep one"),
        ({"chosen": "a", "rejected": "b"}, "chosen", "missing_field", "no prompt stands before the answers"),
        ({"prompt": "a", "completion": "b", "label": False}, "chosen", "worse_answer", "judged a bad one"),
        ({"prompt": "a", "label": 3}, "chosen", "missing_field", "no `label` true or false"),
        (share(("human", "a"), ("gpt", "b"), tools="[{"), "sharegpt", "bad_tools", "not valid JSON"),
        (share(("human", "a"), ("gpt", "b"), tools={"a": 1}), "sharegpt", "bad_tools", "is an object"),
        ({"text": "a", "label": True}, "text", "preference", "no row for supervised training"),
        ({"text": "a", "images": ["a.png"]}, "text", "media", "`images` holds a list of 1"),
        ({"text": "a"}, "alpaca", "other_format", "looks like text, but --format is alpaca"),
    ],
)
def test_a_faulty_row_says_why(value: object, name: str, reason: str, words: str) -> None:
    found, detail = reject(value, name)
    assert found == reason
    assert words in detail


def test_empty_lists_of_pictures_are_no_obstacle() -> None:
    assert one({"text": "a", "images": []}).text == "a"


def test_each_file_has_its_own_format() -> None:
    raw = raws({"text": "a"}, file="a.jsonl") + raws({"prompt": "a", "completion": "b"}, file="b.jsonl")
    rows, rejects = parse_rows(raw, "auto")
    assert (len(rows), rejects) == (2, [])


def test_the_first_row_that_fits_sets_the_format() -> None:
    rows, rejects = parse_rows(raws(7, {"instruction": "a"}, {"instruction": "a", "output": "b"}), "auto")
    assert [row.origin.row for row in rows] == [3]
    assert [(each.origin.row, each.reason) for each in rejects] == [(1, "not_an_object"), (2, "missing_field")]


def test_unknown_columns_are_listed_with_the_nearest_spelling() -> None:
    with pytest.raises(
        DataError, match=r"fit no known format: Instruction, outptu[\s\S]*output for outptu[\s\S]*sharegpt"
    ):
        parse_rows(raws({"Instruction": "a", "outptu": "b"}), "auto")


def test_a_wrong_format_name_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'alpcaa'[\s\S]*did you mean\s+alpaca"):
        parse_rows([], "alpcaa")


def test_no_rows_are_no_error_here() -> None:
    assert parse_rows([], "auto") == ([], [])


def test_format_names_are_unique() -> None:
    assert len({each.NAME for each in FORMATS}) == len(FORMATS)


def faults(count: int, *, files: int = 1) -> list[Reject]:
    return [Reject(Origin(f"{n % files}.jsonl", n + 1), "bad_json", f"fault {n}") for n in range(count)]


def test_rejects_within_the_limit_raise_nothing() -> None:
    raise_if_too_many(faults(2), 10, max_bad_rows=2)


def test_many_faulty_rows_are_listed_up_to_a_point() -> None:
    with pytest.raises(DataError) as caught:
        raise_if_too_many(faults(23, files=2), 30, max_bad_rows=2)
    text = str(caught.value)
    assert caught.value.message == "23 of 30 rows can't be used: 12 in 0.jsonl, 11 in 1.jsonl"
    assert text.count("fault ") == 20
    assert "… and 3 more" in text
    assert "pass --max-bad-rows 23" in text


def test_a_limit_does_not_let_an_empty_set_through() -> None:
    with pytest.raises(DataError, match="No usable row is left"):
        raise_if_too_many(faults(3), 3, max_bad_rows=100)


def test_rejects_are_written_one_per_line(tmp_path: Path) -> None:
    raw = raws({"text": ""}, {"text": "a"}, {"text": "\udc80\u4e2d", "label": True})
    _, rejects = parse_rows(raw, "text")
    write_rejects(tmp_path / "rejects.jsonl", rejects)
    lines = (tmp_path / "rejects.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["row"] for line in lines] == [1, 3]
    assert json.loads(lines[0]).keys() == {"file", "row", "reason", "detail", "raw"}
    assert "\u4e2d" in lines[1]


def test_rows_left_out_by_choice_are_kept_as_numbers_and_add_up(tmp_path: Path) -> None:
    drawn = [Reject(Origin(f"{n % 2}.jsonl", n), "sampled_out", "not drawn") for n in range(5)]
    some = Rejects(drawn) + faults(2)
    assert (len(some), list(some), some.by_choice) == (2, faults(2), 5)
    assert some.counts() == {"sampled_out": 5, "bad_json": 2}
    both = some + Rejects(drawn[:1])
    assert both.left_out == {("0.jsonl", "sampled_out", "not drawn"): 4, ("1.jsonl", "sampled_out", "not drawn"): 2}
    assert both != some
    raise_if_too_many(some, 9, max_bad_rows=2)
    with pytest.raises(DataError, match="2 of 4 rows can't be used"):  # of those that were to be used
        raise_if_too_many(some, 9, max_bad_rows=1)
    write_rejects(tmp_path / "rejects.jsonl", some)
    lines = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert [line.get("row") for line in lines] == [1, 2, None, None]
    assert lines[3] == {"file": "1.jsonl", "rows": 2, "reason": "sampled_out", "detail": "not drawn"}


def test_counts_are_by_reason_most_frequent_first() -> None:
    made = [Reject(Origin("x", n), reason, "") for n, reason in enumerate(("a", "b", "b"))]
    assert list(counts(made).items()) == [("b", 2), ("a", 1)]


@pytest.mark.parametrize(
    ("added", "context", "expected"),
    [("", "c", "c"), ("c", "", "c"), ("c", None, "c"), ("c", "c", "c"), (" ", "c", "c"), ("", " ", " "), ("", "", "")],
)
def test_of_input_and_context_the_one_that_says_something_is_kept(
    added: str, context: str | None, expected: str
) -> None:
    row = one({"instruction": "a", "input": added, "context": context, "output": "b"})
    assert row.messages[0].input == expected


def test_a_pair_that_is_no_choice_is_a_fault_and_a_shorter_better_one_is_an_answer() -> None:
    short, long = (chat(("user", "q"), ("assistant", "a"), *more)["messages"] for more in ((), (("user", "r"),)))
    rows, (reject,) = parse_rows(
        raws({"chosen": short, "rejected": long}, {"chosen": short, "rejected": short}), "chosen"
    )
    assert [message.content for message in rows[0].messages] == ["q", "a"]
    assert (reject.origin.row, reject.reason) == (2, "ambiguous")
