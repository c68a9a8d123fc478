"""``truetune generate --input``: every row once, whatever stops it in between."""

import json
from pathlib import Path
from typing import Any

import pytest

from truetune.cli.main import main


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "Add 1."}]
    asked = [{"prompt": "Add 1."}, {"messages": turns, "id": "x"}, {"prompt": "Add 2."}]
    path.write_text("".join(json.dumps(row) + "\n" for row in asked), encoding="utf-8")
    return path


def ask(capsys: pytest.CaptureFixture[str], model: Path, rows: Path, out: Path, *flags: str) -> dict[str, Any]:
    capsys.readouterr()
    argv = ["generate", "--model", str(model), "--input", str(rows), "--output", str(out), "--max-new-tokens", "6"]
    assert main([*argv, "--json", *flags]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_row_gets_the_answer_that_its_prompt_gets_alone(
    tiny_model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    found = ask(capsys, tiny_model, rows, out)
    assert (found["answered"], found["kept"], found["failed"]) == (3, 0, 0)
    by_row = {row["row"]: row for row in lines(out)}
    assert set(by_row) == {1, 2, 3}
    assert by_row[2]["id"] == "x"
    assert by_row[1]["answer"] == by_row[2]["answer"]
    argv = ["generate", "--model", str(tiny_model), "--prompt", "Add 1.", "Add 2.", "--max-new-tokens", "6", "--json"]
    assert main(argv) == 0
    alone = json.loads(capsys.readouterr().out.splitlines()[-1])["answers"]
    assert [answer["text"] for answer in alone] == [by_row[1]["answer"], by_row[3]["answer"]]


def test_a_run_that_was_cut_short_is_gone_on_with(
    tiny_model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    ask(capsys, tiny_model, rows, out)
    whole = out.read_text(encoding="utf-8").splitlines(keepends=True)
    out.write_text(whole[0] + whole[1][:20], encoding="utf-8")
    found = ask(capsys, tiny_model, rows, out)
    assert (found["answered"], found["kept"]) == (2, 1)
    assert sorted(out.read_text(encoding="utf-8").splitlines(keepends=True)) == sorted(whole)


def test_a_row_that_does_not_fit_is_written_with_its_reason(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    path.write_text('{"prompt": "%s"}\n{"prompt": "Add 1."}\n' % ("a" * 400), encoding="utf-8")
    assert ask(capsys, tiny_model, path, out)["failed"] == 1
    by_row = {row["row"]: row for row in lines(out)}
    assert "made for at most 256" in by_row[1]["error"]
    assert "error" not in by_row[2]


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "has no rows"), ("{", "row 1: not valid JSON"), ('{"prompt": "x"}\n{"text": "y"}\n', "row 2: no prompt")],
)
def test_a_file_that_is_no_list_of_prompts_is_refused(
    text: str, said: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text, encoding="utf-8")
    assert main(["generate", "--model", str(tiny_model), "--input", str(path), "--output", str(tmp_path / "o")]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_file_with_something_else_in_it_is_left_alone(
    tiny_model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text('{"row": 1, "prompt": "another"}\n', encoding="utf-8")
    assert main(["generate", "--model", str(tiny_model), "--input", str(rows), "--output", str(out)]) == 2
    assert "holds something else" in capsys.readouterr().err
    assert lines(out) == [{"row": 1, "prompt": "another"}]
