"""``truetune preview``: the very tokens of a run, readable with and without colour, and the gate's answer."""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from conftest import SHARED
from truetune.cli.main import main
from truetune.config.preview import PreviewConfig, spans_of
from truetune.config.resolve import resolve
from truetune.config.sft import SFTConfig
from truetune.errors import ConfigError
from truetune.models.tokenizer import ChatTokenizer
from truetune.recipes import preview
from truetune.recipes.data import prepare_sft
from truetune.recipes.preview_rows import Piece, pieces_of, visible
from truetune.recipes.preview_screen import Painter
from truetune.train.log import Screen

LONG = "Explain in one sentence why the sky looks blue; because air scatters blue light more than red light."
ROWS: list[Any] = [
    {"instruction": "Add 1 and 2.", "output": "It is 3."},
    {"instruction": "no answer"},
    {"instruction": "Wie heißt 中 auf Deutsch? 😀", "output": "Mitte\n\tnicht\x1b[31m rot"},
    {"instruction": "Say yes.", "output": "y"},
    {"instruction": LONG[:40], "output": LONG},
    {"instruction": LONG[:40], "output": LONG.replace("more", "far more")},
    {"instruction": "Write a lot", "output": "x" * 300},
]
See = Callable[..., tuple[dict[str, Any], str]]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


@pytest.fixture
def see(tiny_model: Path, rows: Path, capsys: pytest.CaptureFixture[str]) -> See:
    """``(what --json prints, what the screen shows)``."""

    def look(**flags: Any) -> tuple[dict[str, Any], str]:
        named = {"model": str(tiny_model), "data": (str(rows),), **flags}
        capsys.readouterr()
        facts = preview.run(resolve(PreviewConfig, file=None, flags=named))
        return facts, capsys.readouterr().out

    return look


def text_of(shown: dict[str, Any], *, trained: bool) -> str:
    return "".join(token["text"] for token in shown["tokens"] if token["trained"] == trained)


def test_the_rows_shown_are_the_rows_trained_on(see: See, tiny_model: Path, rows: Path) -> None:
    facts, _ = see(rows="1,3", max_bad_rows=1, on_overlong="drop")
    config = SFTConfig(model=str(tiny_model), data=(str(rows),), max_bad_rows=1, on_overlong="drop")
    prepared = prepare_sft(config, ChatTokenizer.load(str(tiny_model)), max_length=256, screen=Screen())
    assert facts["data_sha256"] == prepared.digest
    for shown, index in zip(facts["shown"], (0, 1), strict=True):
        ids, trained = prepared.train.example(index)
        assert [number for token in shown["tokens"] for number in token["ids"]] == ids.tolist()
        flags = [token["trained"] for token in shown["tokens"] for _ in token["ids"]]
        assert flags == trained.tolist()
    assert facts["exit_code"] == 0


def test_context_answer_and_stop_token_are_told_apart(see: See) -> None:
    facts, screen = see(rows="1")
    (row,) = facts["shown"]
    assert text_of(row, trained=False) == "<|im_start|>user\nAdd 1 and 2.<|im_end|>\n<|im_start|>assistant\n\n"
    assert text_of(row, trained=True) == "It is 3.<|im_end|>"
    assert [token["kind"] for token in row["tokens"] if token["text"].startswith("<|")] == [
        "special", "stop", "special", "stop",
    ]  # fmt: skip
    assert "<|im_start|>user↵\nAdd 1 and 2.<|im_end|>□↵\n<|im_start|>assistant↵\n⟦It is 3.<|im_end|>■⟧" in screen
    assert "\x1b" not in screen  # this is no terminal


def test_a_character_of_several_tokens_is_one_piece_and_nothing_steers_the_terminal(see: See) -> None:
    facts, screen = see(rows="3")
    pieces = {token["text"]: token["ids"] for token in facts["shown"][0]["tokens"]}
    assert (len(pieces["ß"]), len(pieces["中"]), len(pieces["😀"])) == (2, 3, 4)
    assert re.search(r"⟦Mitte↵\n→ +nicht␛\[31m rot<\|im_end\|>■⟧", screen)
    assert "\ufffd" not in screen


def test_a_row_that_is_left_out_is_shown_with_its_reason(see: See) -> None:
    facts, screen = see(rows="2,7")
    missing, long = facts["shown"]
    assert (missing["part"], missing["reason"], long["reason"]) == ("rejected", "missing_field", "over_length")
    assert missing["raw"] == '{"instruction": "no answer"}'
    assert "left out: missing_field\n`output` is missing" in screen
    assert "the limit is 256" in long["detail"]


def test_the_verdict_is_what_a_run_would_say(see: See, tiny_model: Path, rows: Path, tmp_path: Path,
                                             capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    facts, screen = see()
    assert facts["exit_code"] == 1
    assert main(["sft", "--model", str(tiny_model), "--data", str(rows), "--out", str(tmp_path / "o")]) == 2
    (first, *_) = capsys.readouterr().err.splitlines()
    assert first.removeprefix("error: ") == facts["refusal"]
    assert f"truetune sft would refuse this: {facts['refusal']}" in screen
    assert facts["rows"] == {"read": 7, "used": 5, "rejected": {"missing_field": 1, "over_length": 1}}


def test_what_a_run_would_take_exits_with_zero(see: See) -> None:
    facts, screen = see(max_bad_rows=1)  # one row over the limit is left out by --on-overlong auto
    assert (facts["exit_code"], facts["refusal"]) == (0, None)
    assert "truetune sft would train on this" in screen


def test_the_figures_add_up(see: See) -> None:
    facts, screen = see(val_split=0.4, max_bad_rows=1)
    rows, train, held = facts["rows"], facts["train"], facts["held_out"]
    assert rows["read"] == rows["used"] + sum(rows["rejected"].values()) == 7
    assert train["rows"] + held["rows"] == rows["used"]
    assert sum(bar["rows"] for bar in train["histogram"]) == train["rows"]
    assert 0 < facts["packing"]["fill"] <= 1
    assert 0 < facts["packing"]["step_fill"] <= 1
    assert f"{held['rows']} held out" in screen


def test_near_repeats_are_counted_and_named(see: See) -> None:
    facts, screen = see()
    assert (facts["repeats"]["exact"], facts["repeats"]["near"]) == (0, 1)
    ((row, other, share),) = facts["repeats"]["rows"]["near"]
    assert row.endswith("row 6")
    assert other.endswith("row 5")
    assert f"{row} ~ {other} ({share:.0%})" in screen


def test_worst_shows_what_to_look_at_first_with_the_reason(see: See) -> None:
    facts, _ = see(worst=True)
    why = {shown["row"]: shown["why"] for shown in facts["shown"]}
    assert why[2] == why[7] == "left out"
    assert "shortest answer" in why[4]
    assert "longest" in why[6]
    assert "nearly" in why[6]


@pytest.mark.parametrize(("count", "numbers"), [(0, []), (2, [1, 5]), (99, [1, 3, 4, 5, 6, 2, 7])])
def test_a_sample_is_spread_over_all_rows(see: See, count: int, numbers: list[int]) -> None:
    facts, _ = see(sample=count)
    assert [shown["row"] for shown in facts["shown"]] == numbers


def test_rows_are_found_by_the_number_that_reports_give(see: See, capsys: pytest.CaptureFixture[str]) -> None:
    facts, _ = see(rows="0,4-5,3,900")
    assert [shown["row"] for shown in facts["shown"]] == [3, 4, 5]
    with pytest.raises(ConfigError, match="--rows 0,8-12: there is no such row") as caught:
        see(rows="0,8-12")
    assert caught.value.notes == (("expected", "numbers up to 7, counted from 1"),)


@pytest.mark.parametrize("text", ["", "a", "3-1", "1,,2", "-3", "1.5"])
def test_what_is_no_list_of_rows_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="such as 5,10-12"):
        spans_of(text)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"rows": "x"}, "--rows: found 'x', expected numbers and ranges of rows, such as 5,10-12"),
        ({"rows": "1", "worst": True}, "--rows and --worst: each says which rows to show"),
        ({"sample": 1, "worst": True}, "--sample and --worst"),
        ({"val_split": 0.1, "val_data": ["v"]}, "--val-split and --val-data: each names the held-out rows"),
    ],
)
def test_settings_that_make_no_sense_are_refused(flags: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        PreviewConfig(model="m", data=("d",), **flags)


def test_a_data_set_without_any_usable_row_is_refused_as_by_a_run(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"instruction": "a", "output": ""}\n' * 2)
    assert main(["preview", "--model", str(tiny_model), "--data", str(path)]) == 2
    said = capsys.readouterr().err
    assert "2 of 2 rows can't be used" in said
    assert "No usable row is left" in said


def test_the_command_prints_one_object_and_gives_its_answer_as_exit_code(
    tiny_model: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", str(tiny_model), "--data", str(rows), "--sample", "1", "--json"]
    assert main(["preview", *flags]) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["exit_code"] == 1
    assert main(["preview", *flags, "--max-bad-rows", "1"]) == 0


def painted(pieces: list[Piece], **console: Any) -> str:
    sink = io.StringIO()
    painter = Painter(Console(file=sink, width=200, **console))
    painter.console.print(painter._tokens(pieces))
    return sink.getvalue()


PIECES = [Piece("<s>", (1,), False, "special"), Piece("Q", (5,), False, "text"), Piece("A", (6,), True, "text"),
          Piece("B", (7,), True, "text"), Piece("</s>", (2,), True, "stop")]  # fmt: skip
TERMINAL = {"force_terminal": True, "color_system": "truecolor"}


def test_a_terminal_shows_trained_tokens_in_colour_and_their_borders() -> None:
    line = painted(PIECES, **TERMINAL)
    assert "⟦" not in line
    styles = re.findall(r"\x1b\[([0-9;]+)m([^\x1b]+)", line)
    by_text = {text: style for style, text in styles}
    assert len({by_text["A"], by_text["B"], by_text["</s>■"], by_text["<s>"]}) == 4


def test_without_colour_brackets_stand_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert painted(PIECES) == "<s>Q⟦AB</s>■⟧\n"
    monkeypatch.setenv("NO_COLOR", "1")
    assert painted(PIECES, **TERMINAL) == "<s>Q⟦AB</s>■⟧\n"


@pytest.mark.parametrize(
    ("text", "shown"),
    [("plain", "plain"), ("a\nb", "a↵\nb"), ("\x00\x1b", "␀␛"), ("\u202e", "⟨U+202E⟩"), ("\x7f", "⟨U+007F⟩"),
     ("👩\u200d🔬", "👩\u200d🔬"), ("a\u00a0b", "a\u00a0b")],
)  # fmt: skip
def test_what_can_not_be_seen_is_made_visible(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_an_example_that_ends_in_half_a_character_loses_no_token(tiny_model: Path) -> None:
    tokenizer = ChatTokenizer.load(str(tiny_model))
    (ids,) = tokenizer.encode(["a中"])
    pieces = list(pieces_of(ids[:-1], [True] * 3, tokenizer))
    assert [number for piece in pieces for number in piece.ids] == ids[:-1]
    assert [piece.trained for piece in pieces] == [False, True]  # the first token has no predecessor


BROKEN = SHARED / "data" / "broken"


@pytest.mark.skipif(not BROKEN.is_dir(), reason=f"no sample data at {BROKEN}")
@pytest.mark.parametrize(
    ("name", "code", "rejected"),
    [
        ("bad_json_line", 1, {"bad_json": 1}),
        ("bom_crlf", 0, {}),
        ("duplicate_rows", 0, {}),
        ("empty_output", 1, {"empty_output": 2}),
        ("huge_row", 0, {"over_length": 1}),
        ("latin1", 1, {"not_utf8": 2}),
        ("missing_field", 1, {"missing_field": 3}),
        ("mixed_formats", 1, {"other_format": 5, "preference": 1}),
        ("only_system", 1, {"no_answer": 3}),
        ("unknown_role", 1, {"unknown_role": 3, "missing_field": 1}),
        ("wrong_type", 1, {"wrong_type": 4, "not_an_object": 2}),
    ],
)
def test_every_faulty_row_is_counted_by_its_reason_and_shown(
    see: See, name: str, code: int, rejected: dict[str, int]
) -> None:
    facts, screen = see(data=(str(BROKEN / f"{name}.jsonl"),), sample=99)
    rows = facts["rows"]
    assert (facts["exit_code"], rows["rejected"]) == (code, rejected)
    assert rows["read"] == rows["used"] + sum(rejected.values()) == len(facts["shown"])
    for shown in facts["shown"]:
        if shown["part"] == "rejected":
            assert f"row {shown['row']}" in screen
            assert shown["detail"] in screen
