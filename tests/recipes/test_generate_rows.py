"""``truetune generate --input``: every row once, whatever stops it in between."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from serve.live import make_adapter
from truetune.cli.main import main
from truetune.config.generate import GenerateConfig
from truetune.config.lora import LoRA
from truetune.recipes.generate_input import setup_of


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


def test_answers_of_another_setup_are_never_taken_for_these(
    tiny_model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, adapter = tmp_path / "out.jsonl", tmp_path / "adapter"
    make_adapter(tiny_model, adapter, LoRA(rank=2, alpha=8), seed=1)
    ask(capsys, tiny_model, rows, out)
    before = out.read_bytes()
    assert ask(capsys, tiny_model, rows, out, "--rows", "2")["kept"] == 3
    argv = ["generate", "--model", str(tiny_model), "--input", str(rows), "--output", str(out), "--max-new-tokens"]
    for flags in (["7"], ["6", "--adapter", str(adapter)], ["6", "--temperature", "1"], ["6", "--template", "chatml"]):
        assert main([*argv, *flags]) == 2
        assert "holds answers of another model" in " ".join(capsys.readouterr().err.split())
    assert out.read_bytes() == before


def test_what_decides_the_answers_decides_the_setup(
    tiny_model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template, out = tmp_path / "own.jinja", tmp_path / "out.jsonl"
    template.write_text("{{ messages[0].content }}", encoding="utf-8")
    ask(capsys, tiny_model, rows, out, "--template", str(template))
    template.write_text("{{ messages[0].content }}!", encoding="utf-8")
    argv = ["generate", "--model", str(tiny_model), "--input", str(rows), "--output", str(out), "--max-new-tokens", "6"]
    assert main([*argv, "--template", str(template)]) == 2
    folders = [tmp_path / "one", tmp_path / "other"]
    for number, folder in enumerate(folders):  # by PEFT's older file
        make_adapter(tiny_model, folder, LoRA(rank=2, alpha=8), seed=1)
        tensors = load_file(folder / "adapter_model.safetensors")
        (folder / "adapter_model.safetensors").unlink()
        torch.save({name: tensor + number for name, tensor in tensors.items()}, folder / "adapter_model.bin")
    configs = [GenerateConfig(model=str(tiny_model), prompt=("x",), adapter=(str(folder),)) for folder in folders]
    assert setup_of(configs[0], None) != setup_of(configs[1], None)


def test_a_rows_own_columns_are_kept_whatever_they_are_called(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    asked = [{"prompt": "Add\u2028 1.", "answer": "2", "row": 7, "score": float("nan")}, {"prompt": "Add 2.\u0085"}]
    lines_of = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in asked)
    path.write_text(lines_of, encoding="utf-8-sig")
    ask(capsys, tiny_model, path, out)
    found = ask(capsys, tiny_model, path, out)
    assert (found["answered"], found["kept"]) == (0, 2)
    by_row = {row["row"]: row for row in map(json.loads, out.read_text(encoding="utf-8").strip().split("\n"))}
    assert (by_row[1]["given_answer"], by_row[1]["given_row"], by_row[1]["prompt"]) == ("2", 7, asked[0]["prompt"])
    assert by_row[1]["answer"] != "2"


def test_rows_that_one_trains_on_can_be_asked(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    asked = [{"instruction": "Add", "input": "1.", "output": "2"}, {"prompt": "Add\n\n1."}]
    path.write_text("".join(json.dumps(row) + "\n" for row in asked), encoding="utf-8")
    ask(capsys, tiny_model, path, out)
    first, second = sorted(lines(out), key=lambda row: row["row"])
    assert first["answer"] == second["answer"]
    assert first["output"] == "2"


def test_a_row_that_does_not_fit_is_written_with_its_reason(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    path.write_text('{"prompt": "%s"}\n{"prompt": "Add 1."}\n' % ("a" * 400), encoding="utf-8")
    assert ask(capsys, tiny_model, path, out)["failed"] == 1
    assert ask(capsys, tiny_model, path, out)["failed"] == 1  # they are not asked again, and not forgotten
    by_row = {row["row"]: row for row in lines(out)}
    assert "made for at most 256" in by_row[1]["error"]
    assert "error" not in by_row[2]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no rows"),
        ("{", "row 1: not valid JSON: expecting property name enclosed in double quotes at column 2"),
        ('[\n{"prompt": "x"}\n]\n', "JSON lines, one row in each, and not one array of them"),
        ('{"prompt": "x"}\n{"prompt": "caf\udce9"}\n', "row 2: not UTF-8: first invalid byte 0xE9 at file offset 31"),
        ('{"prompt": "x"}\n{"text": "y"}\n', "row 2: no prompt"),
        ("1", "row 1: no prompt"),
        ('[{"prompt": "x"}, {"prompt": "y"}]', "row 1: a list of rows"),
        ('{"messages": [{"role": "user"}]}', "row 1: no prompt"),
        ('{"instruction": 1}', "row 1:"),
        ('{"prompt": "a", "id": "\\ud83d"}', "row 1: \\ud83d is half of a character"),
        (
            '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}',
            "ends with an answer",
        ),
    ],
)
def test_a_file_that_is_no_list_of_prompts_is_refused(
    text: str, said: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
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
