"""What settings about data make of rows, and what is said and counted of it."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from conftest import CHATML
from truetune.cli.main import main
from truetune.config.sft import SFTConfig
from truetune.data.template import without_thinking
from truetune.errors import ConfigError, DataError
from truetune.models.tokenizer import ChatTokenizer
from truetune.recipes.data import Prepared, prepare_sft
from truetune.train.log import Screen

Prepare = Callable[..., Prepared]
# As Qwen3's: a prompt for an answer that does not think brings the empty thoughts along.
SWITCHED = CHATML.replace(
    "<|im_start|>assistant\\n' }}",
    "<|im_start|>assistant\\n' }}{%- if enable_thinking is defined and not enable_thinking -%}"
    "{{ '<think></think>' }}{%- endif -%}",
).replace("m.content", "('<think></think>' if m.role == 'assistant' else '') + m.content")


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def chat(*answers: str, system: str = "", **more: Any) -> dict[str, Any]:
    turns = [{"role": "system", "content": system}] if system else []
    for answer in answers:
        turns += [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": answer}]
    return {"messages": turns, **more}


@pytest.fixture
def prepare(tiny_model: Path) -> Prepare:
    def made(data: Path, **settings: Any) -> Prepared:
        config = SFTConfig(model=str(tiny_model), data=(str(data),), **settings)
        tokenizer = ChatTokenizer.load(str(tiny_model))
        return prepare_sft(config, tokenizer, max_length=settings.get("max_length", 256), screen=Screen())

    return made


def test_what_was_dropped_is_in_the_report_by_policy(prepare: Prepare, tmp_path: Path) -> None:
    rows = [chat("<think>a</think>b", "<think>c</think>d", system="s"), chat("e", system="t"), chat("f")]
    path = write(tmp_path / "rows.jsonl", rows)
    policies = {"thinking": "drop", "tools": "drop", "system_messages": "keep"}
    assert prepare(path, **policies).report["dropped"] == {"thinking": 1, "tools": 0}
    assert prepare(path, **policies, val_split=0.5).report["dropped"] == {"thinking": 1, "tools": 0}
    assert prepare(path).report["dropped"] == {}


def test_conversations_are_no_blocks_of_text(prepare: Prepare, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [chat("a")])
    with pytest.raises(ConfigError, match="--text-blocks: there are conversations"):
        prepare(path, text_blocks=True)


def test_a_text_over_the_limit_is_cut_into_blocks_with_no_token_lost(
    prepare: Prepare, tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "book.txt"
    path.write_text("once upon a time " * 50, encoding="utf-8")
    made = prepare(path, text_blocks=True, max_length=64)
    assert "blocks of 64 tokens" in capsys.readouterr().err
    blocks = [made.train.example(i)[0].tolist() for i in range(len(made.train))]
    assert [len(block) for block in blocks[:-1]] == [64] * (len(blocks) - 1)
    joined = [*blocks[0], *(number for block in blocks[1:] for number in block[1:])]
    tokenizer = ChatTokenizer.load(str(tiny_model))
    assert tokenizer.decode(joined) == path.read_text(encoding="utf-8") + tokenizer.eos_token
    assert (made.report["read"], made.report["used"], made.report["rejected"]) == (1, 1, {})


def test_fill_in_the_middle_says_that_conversations_stay_as_they_are(
    tmp_path: Path, make_tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_tiny(tmp_path / "coder")
    tokenizer = ChatTokenizer.load(str(model))
    tokenizer.add(["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"])
    said = []
    for row in (chat("a"), {"text": "some text"}):
        path = write(tmp_path / "rows.jsonl", [row])
        config = SFTConfig(model=str(model), data=(str(path),), fim_rate=0.5)
        prepare_sft(config, tokenizer, max_length=256, screen=Screen())
        said.append("--fim-rate: the conversations" in " ".join(capsys.readouterr().err.split()))
    assert said == [True, False]


def test_a_folder_with_rows_to_test_on_is_said(
    prepare: Prepare, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "train.jsonl", [chat("a")])
    write(tmp_path / "test.jsonl", [chat("b")])
    prepare(tmp_path)
    assert "test.jsonl too" in " ".join(capsys.readouterr().err.split())


def test_without_thinking_the_prompt_is_the_one_for_answers_that_do_not_think(
    prepare: Prepare, tmp_path: Path, tiny_model: Path
) -> None:
    path = write(tmp_path / "rows.jsonl", [chat("<think>hm</think>yes")])
    jinja = tmp_path / "switched.jinja"
    jinja.write_text(SWITCHED, encoding="utf-8")
    made = prepare(path, thinking="drop", template=str(jinja))
    tokens, trained = made.train.example(0)
    tokenizer = ChatTokenizer.load(str(tiny_model))
    learned = tokens[trained].tolist()
    assert tokenizer.decode(learned) == "yes<|im_end|>"
    prompt = tokenizer.decode(tokens[~trained].tolist())
    assert prompt.startswith("<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n<think></think>")
    assert made.template is not None
    assert made.template.source == without_thinking(SWITCHED) == without_thinking(made.template.source)
    assert without_thinking(CHATML) == CHATML  # it has no such switch


def test_the_file_of_a_run_can_be_previewed(
    tiny_model: Path, alpaca_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    command = ["--model", str(tiny_model), "--data", str(alpaca_file)]
    assert main(["sft", *command, "--out", str(run), "--max-steps", "1", "--rank", "2", "--train-on", "all"]) == 0
    capsys.readouterr()
    assert main(["preview", "--config", str(run / "run.yaml"), "--json"]) == 0
    ours = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert main(["preview", *command, "--train-on", "all", "--json"]) == 0
    assert ours == json.loads(capsys.readouterr().out.splitlines()[-1])
    (run / "run.yaml").write_text((run / "run.yaml").read_text() + "training:\n  batch_sise: 3\n")
    assert main(["preview", "--config", str(run / "run.yaml")]) == 2
    assert "batch_size" in capsys.readouterr().err


def test_a_preview_that_nobody_reads_to_its_end_is_no_refusal(tiny_model: Path, alpaca_file: Path) -> None:
    command = f"{sys.executable} -m truetune preview --model {tiny_model} --data {alpaca_file} --sample 12"
    read, write_end = os.pipe()
    os.close(read)
    done = subprocess.run(command.split(), stdout=write_end, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write_end)
    assert (done.returncode, "Traceback" in done.stderr) == (141, False)


def test_a_row_over_the_limit_is_shown_with_its_start(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [chat("short"), *(chat(f"{n} once upon a time " * 20) for n in range(30))]
    path = write(tmp_path / "rows.jsonl", rows)
    assert main(["preview", "--model", str(tiny_model), "--data", str(path), "--rows", "2", "--json"]) == 1
    out = capsys.readouterr().out
    (shown,) = json.loads(out.splitlines()[-1])["shown"]
    assert shown["raw"].startswith("<|im_start|>user\nWhy?")
    assert "0 once upon" in out
    assert "row 9" in out
    assert "… and" not in out  # a count of lines is none of rows


def test_a_file_that_changes_while_it_is_read_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [chat("a"), chat("a"), chat("b")])

    class Writer(io.StringIO):
        """Whoever appends a row as soon as the repeated rows are warned of, which is after reading."""

        def write(self, text: str, /) -> int:
            with path.open("a") as file:
                file.write(json.dumps(chat("c")) + "\n")
            return super().write(text)

    config = SFTConfig(model=str(tiny_model), data=(str(path),))
    tokenizer, screen = ChatTokenizer.load(str(tiny_model)), Screen()
    screen.console = Console(file=Writer())
    with pytest.raises(DataError, match=r"rows\.jsonl: changed while being read[\s\S]*the same command again"):
        prepare_sft(config, tokenizer, max_length=256, screen=screen)
    assert prepare_sft(config, tokenizer, max_length=256, screen=Screen()).report["read"] > 3


def test_a_file_that_is_named_twice_is_told(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "rows.jsonl", [chat("a"), chat("b")])
    config = SFTConfig(model=str(tiny_model), data=(str(path), str(path)))
    made = prepare_sft(config, ChatTokenizer.load(str(tiny_model)), max_length=256, screen=Screen())
    assert made.report["read"] == 4
    assert "1 file is named more than once in --data" in capsys.readouterr().err
