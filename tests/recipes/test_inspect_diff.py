"""``truetune inspect --diff A B``, and what it says of a GGUF."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from proof_runs import change_json
from training_runs import run_sft, write_rows
from truetune.cli.main import main

Ask = Callable[..., dict[str, Any]]


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Ask:
    """What ``--json`` prints, and under ``code`` the exit code."""

    def asked(*argv: object) -> dict[str, Any]:
        code = main(["inspect", *map(str, argv), "--json"])
        found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return found | {"code": code}

    return asked


def told(facts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["what"]: row for row in facts["differences"]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> tuple[Path, Path, Path]:
    """Two runs with the same settings, and one with another learning rate."""
    folder = tmp_path_factory.mktemp("runs")
    rows = write_rows(folder / "rows.jsonl")
    for name, lr in (("a", 1e-2), ("b", 1e-2), ("c", 5e-3)):
        run_sft(tiny_model, rows, folder / name, epochs=1, lr=lr, verify_prompts=0)
    return folder / "a", folder / "b", folder / "c"


def test_two_checkpoints(runs: tuple[Path, Path, Path], tmp_path: Path, ask: Ask) -> None:
    a, b, c = (sorted((run / "checkpoints").iterdir())[-1] for run in runs)
    assert ask("--diff", a, b)["differences"] == []
    found = ask("--diff", a, c)
    assert (found["kind"], found["code"]) == ("checkpoint", 1)
    rows = told(found)
    assert any(name.startswith("adapter_model: base_model.model.") for name in rows)
    copy = tmp_path / "copy"
    shutil.copytree(a, copy)
    change_json(copy / "adapter" / "adapter_config.json", lora_alpha=999)
    assert list(told(ask("--diff", a, copy))) == ["config: lora_alpha"]
    assert any(name.startswith("optimizer: ") and row["how"].startswith("max |Δ|") for name, row in rows.items())


def test_two_runs_with_one_setting_changed(runs: tuple[Path, Path, Path], ask: Ask) -> None:
    a, b, c = runs
    assert (same := ask("--diff", a, b))["differences"] == []
    assert same["code"] == 0
    facts = ask("--diff", a, c)
    rows = told(facts)
    assert (rows["lr"]["a"], rows["lr"]["b"], rows["lr"]["how"]) == (1e-2, 5e-3, "-0.005")
    assert "result: loss" in rows
    assert any("lora_B" in what for what in rows)
    assert not {"out", "result: tok_s", "data: used"} & rows.keys()
    assert facts["code"] == 1


def test_two_adapters(runs: tuple[Path, Path, Path], tmp_path: Path, ask: Ask) -> None:
    one = runs[0] / "adapter"
    other = Path(shutil.copytree(one, tmp_path / "other"))
    assert ask("--diff", one, other)["differences"] == []
    tensors = load_file(other / "adapter_model.safetensors")
    name, *_, last = sorted(tensors)
    tensors[name][0, 0] += 0.25
    dropped = tensors.pop(last)
    save_file(tensors, other / "adapter_model.safetensors")
    change_json(other / "adapter_config.json", lora_alpha=64)
    rows = told(ask("--diff", one, other))
    assert rows[name]["how"] == "max |Δ| 0.25"
    assert rows[last]["how"] == "only in one"
    assert rows["config: lora_alpha"]["b"] == 64
    assert dropped.numel()
    assert len(rows) == 3


def test_two_models(tiny_model: Path, tmp_path: Path, ask: Ask) -> None:
    other = Path(shutil.copytree(tiny_model, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"][3] -= 0.5
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    change_json(other / "config.json", rms_norm_eps=1e-3)
    rows = told(ask("--diff", tiny_model, other))
    assert set(rows) == {"config: rms_norm_eps", "model.norm.weight"}
    assert rows["model.norm.weight"]["how"] == "max |Δ| 0.5"
    assert rows["model.norm.weight"]["a"] == rows["model.norm.weight"]["b"] == "[32] float32"
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    assert told(ask("--diff", tiny_model, other))["model.norm.weight"]["how"] == "NaN or infinity in B"


def test_two_models_with_the_same_weights(tiny_model: Path, tmp_path: Path, ask: Ask) -> None:
    """They are not the same: another template, stop or vocabulary makes other answers."""
    other = Path(shutil.copytree(tiny_model, tmp_path / "other"))
    core = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    (other / "tokenizer.json").write_text(json.dumps(core, indent=3), encoding="utf-8")
    assert ask("--diff", tiny_model, other)["code"] == 0
    core["added_tokens"][0]["content"] = "<other>"
    (other / "tokenizer.json").write_text(json.dumps(core), encoding="utf-8")
    (other / "chat_template.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
    (other / "generation_config.json").write_text('{"eos_token_id": 7}', encoding="utf-8")
    found = ask("--diff", tiny_model, other)
    assert found["code"] == 1
    rows = told(found)
    assert {"tokenizer.json", "chat_template.jinja", "generation_config: eos_token_id"} <= set(rows)
    assert rows["tokenizer.json"]["how"] == "another content"
    assert rows["generation_config: eos_token_id"]["b"] == 7


def test_two_data_files_row_by_row(tmp_path: Path, ask: Ask) -> None:
    rows = [{"text": f"row {n}"} for n in range(4)]
    for name, held in (("a", rows), ("b", [rows[2], rows[0], {"text": "新"}, rows[1], {"text": "newer"}])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held), encoding="utf-8")
    found = told(ask("--diff", tmp_path / "a.jsonl", tmp_path / "b.jsonl"))
    assert (found["rows"]["a"], found["rows"]["b"]) == (4, 5)
    assert (found["rows only in A"]["a"], found["rows only in B"]["b"]) == (1, 2)
    assert "row 3" in found["rows only in A"]["how"]
    assert "新" in found["rows only in B"]["how"]  # readable, whatever it is written in


def test_a_gguf_and_two_of_them(tiny_model: Path, tmp_path: Path, ask: Ask) -> None:
    pytest.importorskip("gguf", reason="the gguf extra is not installed")
    for kind in ("f32", "f16"):
        out = str(tmp_path / f"{kind}.gguf")
        assert main(["export", "--model", str(tiny_model), "--to", "gguf", "--gguf-type", kind, "--out", out]) == 0
    facts = ask(tmp_path / "f16.gguf")
    assert (facts["kind"], facts["architecture"], facts["block_count"]) == ("gguf", "llama", 2)
    assert facts["types"] == {"f16": 16, "f32": 5}
    assert facts["ends_with"] == ["<|endoftext|>", "<|im_end|>"]
    rows = told(ask("--diff", tmp_path / "f32.gguf", tmp_path / "f16.gguf"))
    assert rows["key: general.file_type"]["b"] == 1
    assert "blk.0.attn_q.weight" in rows
    assert "output_norm.weight" not in rows
    (tmp_path / "folder").mkdir()
    (tmp_path / "f16.gguf").rename(tmp_path / "folder" / "model.gguf")
    assert ask(tmp_path / "folder") == facts  # as for Ollama
    assert "blk.0.attn_q.weight" in told(ask("--diff", tmp_path / "f32.gguf", tmp_path / "folder"))
    (tmp_path / "bad.gguf").write_bytes((tmp_path / "f32.gguf").read_bytes()[:999])
    assert main(["inspect", str(tmp_path / "bad.gguf")]) == 2


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--diff", "MODEL"), "expected two"),
        (("--diff", "MODEL", "ROWS"), "two of a kind"),
        (("--diff", "MODEL", "nowhere"), "no file or folder"),
        (("MODEL", "--methods"), "one of the three"),
    ],
)
def test_wrong_questions(
    argv: tuple[str, ...], words: str, tiny_model: Path, alpaca_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"MODEL": str(tiny_model), "ROWS": str(alpaca_file)}
    assert main(["inspect", *(names.get(word, word) for word in argv)]) == 2
    assert words in capsys.readouterr().err
