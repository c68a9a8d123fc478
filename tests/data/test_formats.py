import json
from pathlib import Path
from typing import Any

import pytest

from truetune.data.formats import FORMATS, detect, parse_rows
from truetune.data.rejects import counts, raise_if_too_many, write_rejects
from truetune.data.schema import Message, Origin, RawRow, Reject, Row
from truetune.errors import ConfigError, DataError


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
    turns = [("human", "a"), ("function_call", "b"), ("observation", "c"), ("gpt", "d"), ("user", "e"), ("bard", "f")]
    row = one(share(*turns, system="s"))
    assert [role for role, _ in said(row)] == ["system", "user", "assistant", "tool", "assistant", "user", "assistant"]


@pytest.mark.parametrize("tools", [[{"name": "f"}], '[{"name": "f"}]'])
def test_tools_may_be_a_list_or_json_text(tools: object) -> None:
    assert one(share(("human", "a"), ("gpt", "b"), tools=tools)).tools == ({"name": "f"},)


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


def test_text_has_no_messages() -> None:
    row = one({"text": " a\n"})
    assert (row.text, row.messages) == (" a\n", ())


@pytest.mark.parametrize(
    ("value", "name", "reason", "words"),
    [
        ("a", "text", "not_an_object", "the row is text"),
        ({"text": " "}, "text", "empty_text", "white space only"),
        ({"prompt": "a", "Completion": "b"}, "prompt-completion", "missing_field", "is `Completion` meant?"),
        ({"prompt": [{}], "completion": "b"}, "prompt-completion", "wrong_type", "belongs into `messages`"),
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
        (chat(("user", [{"type": "text"}])), "messages", "wrong_type", "a list of parts"),
        (chat(("User", "a"), ("human", "b")), "messages", "unknown_role", "perhaps 'user' is meant by 'User'"),
        (
            {"messages": [{"from": "human", "value": "a"}]},
            "messages",
            "missing_field",
            "are the sharegpt form: name the list `conversations`",
        ),
        (
            {"conversations": [{"role": "user", "content": "a"}]},
            "sharegpt",
            "missing_field",
            "are the messages form: name the list `messages`",
        ),
        (
            {"messages": [{"role": "assistant", "content": "a", "weight": 0}]},
            "messages",
            "unsupported_key",
            "message 1: `weight`",
        ),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}]},
            "messages",
            "unsupported_key",
            "`tool_calls` is not understood",
        ),
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
