"""``truetune chat``, piped: answers on stdout, everything else on stderr."""

import io
import json
from pathlib import Path

import pytest

from families import perturb
from truetune.adapters import files
from truetune.adapters.inject import attach
from truetune.cli.main import main
from truetune.config.lora import LoRA
from truetune.models.load import load_model


def say(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    model: Path,
    *said: str,
    flags: tuple[str, ...] = (),
) -> tuple[list[str], str, dict[str, int]]:
    """``(answers, what stderr says, the result)``."""
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in said)))
    capsys.readouterr()
    assert main(["chat", "--model", str(model), "--max-new-tokens", "8", "--json", *flags]) == 0
    shown = capsys.readouterr()
    *answers, last = shown.out.rstrip("\n").split("\n")
    return answers, shown.err, json.loads(last)


def row_of(path: Path) -> list[dict[str, str]]:
    messages: list[dict[str, str]] = json.loads(path.read_text(encoding="utf-8"))["messages"]
    return messages


def test_a_conversation_is_remembered_until_it_is_reset(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    lines = (
        "/system Be short.",
        "Hello \\",
        "there",
        "And?",
        f"/save {first}",
        "/reset",
        "/system",
        "Hi",
        f"/save {second}",
    )
    _, _, result = say(capsys, monkeypatch, tiny_model, *lines)
    assert [turn["role"] for turn in row_of(first)] == ["system", "user", "assistant", "user", "assistant"]
    assert row_of(first)[1]["content"] == "Hello \nthere"
    assert [turn["role"] for turn in row_of(second)] == ["user", "assistant"]
    assert result["turns"] == 3


def test_mistakes_are_said_and_the_conversation_goes_on(
    tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = (
        "/adaptor x",
        "/adapter nobody",
        "/adapter a=/nowhere",
        "/save",
        "/base",
        "x" * 400,
        "/exit",
        "never asked",
    )
    _, said, result = say(capsys, monkeypatch, tiny_model, *lines)
    for expected in ("there is no /adaptor", "did you mean   adapter", "there is no adapter 'nobody'",
                     "there is no folder /nowhere", "/save needs a file's name", "/base needs a question",
                     "made for at most 256"):  # fmt: skip
        assert expected in said
    assert result == {"turns": 0, "new_tokens": 0}


def test_base_and_adapter_answer_side_by_side(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    model = load_model(str(tiny_model), dtype=torch.float32)
    attach(model, LoRA(rank=2, alpha=64))
    perturb(model)
    files.save(model, tmp_path / "own", base=None)
    kept = [tmp_path / f"{name}.jsonl" for name in ("base", "own", "after")]
    lines = (
        "Add 1.", f"/save {kept[0]}", "/reset", f"/adapter own={tmp_path / 'own'}", "/base Add 1.", "Add 1.",
        f"/save {kept[1]}", "/reset", "/adapter", "Add 1.", f"/save {kept[2]}",
    )  # fmt: skip
    _, said, result = say(capsys, monkeypatch, tiny_model, *lines)
    base, own, after = (row_of(path) for path in kept)
    assert base == after != own
    assert result["turns"] == 5
    assert "known: own" in said
