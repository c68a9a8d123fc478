"""``truetune inspect``: what is this?"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from truetune.cli.main import main


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, alpaca_file: Path) -> Path:
    out = tmp_path_factory.mktemp("runs") / "out"
    argv = ["sft", "--model", str(tiny_model), "--data", str(alpaca_file), "--out", str(out)]
    assert main([*argv, "--max-steps", "1", "--rank", "2"]) == 0
    return out


def facts(path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["inspect", str(path), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def refusal(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["inspect", str(path)]) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ")
    assert "Traceback" not in text
    return text


def test_a_model(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = facts(tiny_model, capsys)
    assert (found["kind"], found["architecture"], found["context"]) == ("model", "LlamaForCausalLM", 256)
    assert found["dtypes"] == {"float32": 21}
    assert found["chat_template"] is True
    assert facts(tiny_model / "model.safetensors", capsys) == found


@pytest.mark.parametrize("flags", [["nf4", "--double-quant"], ["int8"]])
def test_a_packed_model_has_the_parameters_that_it_stands_for(
    flags: list[str], tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", str(tiny_model), str(tmp_path / "packed"), "--quant", *flags]) == 0
    found, dense = facts(tmp_path / "packed", capsys), facts(tiny_model, capsys)
    assert found["quantised"] == ("nf4, double quantised" if flags[1:] else "int8")
    assert found["parameters"] == dense["parameters"]
    assert found["size_mb"] <= dense["size_mb"]
    assert "quantised" not in dense


def test_an_adapter(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = facts(run / "adapter", capsys)
    assert (found["kind"], found["rank"], found["template"]) == ("adapter", 2, "own")
    assert found["metrics"]["steps"] == 1
    assert facts(run / "adapter" / "adapter_model.safetensors", capsys) == found


def test_a_checkpoint(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = facts(run / "checkpoints" / "step-000001", capsys)
    assert (found["kind"], found["step"]) == ("checkpoint", 1)
    assert "every file has its size and hash" in found["complete"]


def test_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = facts(run, capsys)
    assert (found["kind"], found["finished"], found["steps"]) == ("run", True, 1)
    assert found["result"].endswith("adapter")


def test_data_with_faults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "a", "output": "b"}\n{"instruction": "c"}\n{\n', encoding="utf-8")
    found = facts(path, capsys)
    assert (found["kind"], found["format"], found["rows"], found["usable"]) == ("data", "alpaca", 3, 1)
    assert found["faulty"] == {"bad_json": 1, "missing_field": 1}


def test_data_of_which_no_row_can_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("{\n{\n", encoding="utf-8")
    found = facts(path, capsys)
    assert (found["rows"], found["usable"], found["faulty"]) == (2, 0, {"bad_json": 2})


def test_a_missing_path_names_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "adapter").mkdir()
    assert "did you mean   adapter" in refusal(tmp_path / "adaptre", capsys)


def test_an_empty_folder_is_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is nothing that truetune knows\n  it has     no file at all" in refusal(tmp_path, capsys)


def test_data_with_other_columns_or_preferences_is_read_as_it_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.tsv"
    path.write_text("ask\treply\nHi\tHello\n", encoding="utf-8")
    refusal(path, capsys)
    assert main(["inspect", str(path), "--columns", "prompt=ask", "completion=reply", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["format"], found["usable"], found["characters"]) == ("prompt-completion", 1, 7)
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "Hi", "chosen": "Hello", "rejected": "No"}\n', encoding="utf-8")
    refusal(path, capsys)
    assert main(["inspect", str(path), "--format", "chosen", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["messages"] == {"user": 1, "assistant": 1}


@pytest.mark.parametrize("name", ["notes.docx", "weights.bin", "noname"])
def test_a_file_of_another_kind_is_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / name).write_bytes(bytes(range(256)))
    assert "known kinds" in refusal(tmp_path / name, capsys)


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json", "run.yaml", "state.json"])
def test_a_folder_with_a_damaged_marker_is_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(b"\xff{]")
    refusal(tmp_path, capsys)


def test_a_damaged_weight_file_is_refused(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"hello")
    refusal(tmp_path, capsys)


def test_a_log_cut_short_by_a_kill_is_read_up_to_there(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    killed = Path(shutil.copytree(run, tmp_path / "killed"))
    with (killed / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 2, "loss": 1.')
    assert facts(killed, capsys)["steps"] == 1


def test_data_tells_what_nearly_repeats_and_what_it_is_written_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "Explain in one sentence why the sky looks blue; because air scatters blue light more than red light."
    texts = [said, said.replace("more", "far more"), "привет мир"]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    found = facts(path, capsys)
    assert (found["repeated"], found["nearly_repeated"], found["rows_with_code"]) == (0, 1, 0)
    assert list(found["letters"]) == ["latin", "cyrillic"]
