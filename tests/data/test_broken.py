"""Every file of shared/data: the faulty ones report what their README asks for, the real ones lose no row."""

from pathlib import Path

import pytest

from truetune.data.duplicates import duplicates
from truetune.data.formats import detect, parse_rows
from truetune.data.read import read_rows
from truetune.data.rejects import raise_if_too_many
from truetune.data.schema import Reject, Row
from truetune.errors import DataError

SHARED = Path(__file__).parents[3] / "shared" / "data"
pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no sample data at {SHARED}")


def load(name: str) -> tuple[list[Row], dict[int, Reject]]:
    raw, unread = read_rows([str(SHARED / name)])
    rows, rejects = parse_rows(raw, "auto")
    assert len(raw) == len(rows) + len(rejects)
    return rows, {reject.origin.row: reject for reject in [*unread, *rejects]}


FAULTS = [
    ("bad_json_line", 11, {7: ("bad_json", "not valid JSON: unterminated string at column 78")}),
    ("bom_crlf", 6, {}),
    ("duplicate_rows", 10, {}),
    ("empty_output", 8, {3: ("empty_output", "`output` is empty"), 6: ("empty_output", "white space only")}),
    ("huge_row", 3, {}),
    (
        "latin1",
        3,
        {
            2: ("not_utf8", "first invalid byte 0xE9 at file offset 137, byte 57 of the line (counted from 0)"),
            4: ("not_utf8", "0xF6 at file offset 350, byte 87 of the line"),
        },
    ),
    (
        "missing_field",
        7,
        {
            2: ("missing_field", "`output` is missing; the fields are `instruction`, `input`"),
            5: ("missing_field", "`instruction` is missing"),
            10: ("missing_field", "`output` is missing; is `Output` meant?"),
        },
    ),
    (
        "mixed_formats",
        2,
        {
            2: ("other_format", "looks like messages, but row 1 set the format of this file: alpaca"),
            3: ("other_format", "looks like sharegpt"),
            4: ("other_format", "looks like prompt-completion"),
            5: ("other_format", "looks like text"),
            6: ("preference", "(`prompt`, `chosen`, `rejected`): no row for supervised training"),
            8: ("other_format", "looks like messages"),
        },
    ),
    (
        "only_system",
        2,
        {
            2: ("no_answer", "only a system message"),
            4: ("no_answer", "2 system messages and nothing else"),
            5: ("no_answer", "no assistant message (found: system, user)"),
        },
    ),
    (
        "unknown_role",
        2,
        {
            2: ("unknown_role", "unknown role 'narrator' (message 2)"),
            4: ("unknown_role", "unknown role 'User' (message 1); perhaps 'user'"),
            5: ("unknown_role", "'human' (message 1), 'gpt' (message 2); they belong to the sharegpt form"),
            6: ("missing_field", "message 1: `role` is missing"),
        },
    ),
    (
        "wrong_type",
        4,
        {
            2: ("wrong_type", "`output` is a number"),
            4: ("wrong_type", "`instruction` is a list"),
            6: ("wrong_type", "`output` is null"),
            7: ("not_an_object", "the row is a list"),
            9: ("not_an_object", "the row is text"),
            10: ("wrong_type", "`output` is an object"),
        },
    ),
]


@pytest.mark.parametrize(("name", "used", "expected"), FAULTS, ids=[fault[0] for fault in FAULTS])
def test_exactly_the_faulty_rows_are_reported(name: str, used: int, expected: dict[int, tuple[str, str]]) -> None:
    rows, rejects = load(f"broken/{name}.jsonl")
    assert (len(rows), {row: reject.reason for row, reject in rejects.items()}) == (
        used,
        {row: reason for row, (reason, _) in expected.items()},
    )
    for row, (_, words) in expected.items():
        assert words in rejects[row].detail


def test_every_broken_file_is_under_test() -> None:
    assert {path.stem for path in (SHARED / "broken").glob("*.jsonl")} == {"empty", *(fault[0] for fault in FAULTS)}


def test_rows_after_a_bad_line_keep_their_numbers() -> None:
    rows, _ = load("broken/bad_json_line.jsonl")
    assert [row.origin.row for row in rows] == [1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12]


def test_an_empty_file_is_an_error() -> None:
    with pytest.raises(DataError, match=r"empty\.jsonl: no rows: the file is empty"):
        load("broken/empty.jsonl")


def test_bom_and_crlf_leave_no_trace_and_escaped_crlf_stays() -> None:
    rows, _ = load("broken/bom_crlf.jsonl")
    texts = [message.content for row in rows for message in row.messages]
    assert not any("\ufeff" in text or text.endswith("\r") for text in texts)
    assert any("\r\n" in message.content for message in rows[3].messages)


def test_a_huge_row_is_read_whole() -> None:
    rows, _ = load("broken/huge_row.jsonl")
    assert len(rows[1].messages[-1].content) == 204_800


def test_duplicates_are_found_whatever_the_order_of_keys() -> None:
    rows, _ = load("broken/duplicate_rows.jsonl")
    assert [(row.row, first.row) for row, first in duplicates(rows)] == [(4, 1), (7, 2), (9, 2)]


def test_the_error_for_one_row_has_the_row_and_the_way_out() -> None:
    _, rejects = load("broken/bad_json_line.jsonl")
    with pytest.raises(DataError) as caught:
        raise_if_too_many(list(rejects.values()), 12, max_bad_rows=0)
    assert caught.value.message.endswith("bad_json_line.jsonl, row 7: not valid JSON: unterminated string at column 78")
    assert caught.value.notes[-1][1] == (
        "11 of 12 rows are fine. Mend the row, or pass --max-bad-rows 1 to leave it out "
        "(it is then listed in OUT/data/rejects.jsonl)."
    )


SOUND = {
    "alpaca_en.json": ("alpaca", 999),
    "alpaca_zh.json": ("alpaca", 1000),
    "c4_demo.jsonl": ("text", 300),
    "fastchat_dummy_conversation.json": ("sharegpt", 500),
    "glaive_toolcall_en.json": ("sharegpt", 200),
    "glaive_toolcall_zh.json": ("sharegpt", 200),
    "gpteacher_codegen_1000.json": ("alpaca", 1000),
    "gsm8k_train_2000.jsonl": ("prompt-completion", 2000),
    "identity.json": ("alpaca", 91),
    "mbpp.jsonl": ("prompt-completion", 974),
    "oasst_fr_top1.jsonl": ("messages", 256),
    "tinyshakespeare.txt": ("text", 1),
    "user_oriented_instructions.jsonl": ("alpaca", 252),
    "wiki_demo.txt": ("text", 1),
    "wikitext2_raw_test.txt": ("text", 1),
}
REFUSED = {
    "dpo_en.json": r"a preference row \(`conversations`, `chosen`, `rejected`\): no row for supervised training",
    "kto_en.json": "a preference row .`label` true or false judges the answer",
    "mllm_demo.json": "`images` holds a list of 2: only text can be trained on",
    "stack_exchange_paired_tiny.json": r"a preference row \(`question`, `response_j`, `response_k`\)",
}


def test_every_sample_file_is_under_test() -> None:
    found = {path.name for path in SHARED.iterdir() if path.suffix in (".json", ".jsonl", ".txt")}
    assert found == SOUND.keys() | REFUSED.keys()


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_file_is_detected_and_used_whole(name: str) -> None:
    raw, unread = read_rows([str(SHARED / name)])
    rows, rejects = parse_rows(raw, "auto")
    assert (detect(raw), len(rows), unread, rejects) == (*SOUND[name], [], [])


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_for_other_training_is_refused_by_name(name: str) -> None:
    with pytest.raises(DataError, match=REFUSED[name]):
        load(name)


def test_tool_calls_keep_their_turns_and_tools() -> None:
    rows, _ = load("glaive_toolcall_en.json")
    roles = [message.role for row in rows for message in row.messages]
    assert (roles.count("user"), roles.count("assistant"), roles.count("tool")) == (525, 525 + 137, 137)
    assert any(row.tools for row in rows)
