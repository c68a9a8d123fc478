"""``truetune generate``: the same words from a base, its adapter and the merged model; draws that repeat."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from truetune.cli.main import main
from truetune.config.generate import GenerateConfig
from truetune.generate.answer import answer_all
from truetune.recipes.generate import load_speaker
from truetune.train.log import Screen

STORIES = Path(__file__).resolve().parents[3] / "shared" / "models" / "stories260K"
needs_stories = pytest.mark.skipif(not STORIES.is_dir(), reason=f"no model at {STORIES}")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, alpaca_file: Path) -> Path:
    """Trained hard enough to change every answer."""
    out = tmp_path_factory.mktemp("runs") / "out"
    argv = ["sft", "--model", str(tiny_model), "--data", str(alpaca_file), "--out", str(out)]
    assert main([*argv, "--max-steps", "6", "--rank", "4", "--lr", "0.05"]) == 0
    return out / "adapter"


def ask(capsys: pytest.CaptureFixture[str], model: Path, *flags: str, prompt: str = "Add 1 and 2.") -> dict[str, Any]:
    capsys.readouterr()
    argv = ["generate", "--model", str(model), "--prompt", prompt, "--max-new-tokens", "24", "--json"]
    assert main([*argv, *flags]) == 0
    shown, _, last = capsys.readouterr().out.rstrip("\n").rpartition("\n")
    found: dict[str, Any] = json.loads(last)
    assert shown == found["text"]
    return found


def test_adapter_and_merged_model_say_the_same(
    tiny_model: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merged = tmp_path / "merged"
    assert main(["merge", "--model", str(tiny_model), "--adapter", str(adapter), "--out", str(merged)]) == 0
    base, tuned, folded = (
        ask(capsys, tiny_model),
        ask(capsys, tiny_model, "--adapter", str(adapter)),
        ask(capsys, merged),
    )
    assert tuned["text"] == folded["text"] != base["text"]
    assert tuned["prompt_tokens"] == folded["prompt_tokens"]


def test_the_prompt_may_come_from_standard_input(
    tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Add 1 and 2."))
    assert ask(capsys, tiny_model, prompt="-")["text"] == ask(capsys, tiny_model)["text"]


def test_a_seed_repeats_a_draw_and_another_does_not(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draws = [ask(capsys, tiny_model, "--temperature", "1.5", "--seed", seed)["text"] for seed in ("1", "1", "2")]
    assert draws[0] == draws[1] != draws[2]


def test_a_stop_token_ends_the_answer(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The token that the model says third is made a stop token by its generation settings."""
    speaker = load_speaker(GenerateConfig(model=str(tiny_model), prompt="x"), Screen())
    prompt = speaker.prompt_ids("Add 1 and 2.")
    (said,) = answer_all(speaker.model, [prompt], stop_ids=frozenset(), longest=3)
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [said[2]]}), encoding="utf-8")
    found = ask(capsys, model)
    assert (found["stopped"], found["new_tokens"]) == (True, said.index(said[2]) + 1)


def test_settings_of_the_models_own_are_not_mixed_in(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    own = {"do_sample": True, "repetition_penalty": 50.0, "top_k": 1, "temperature": 9.0, "max_length": 3}
    (model / "generation_config.json").write_text(json.dumps(own), encoding="utf-8")
    assert ask(capsys, model)["text"] == ask(capsys, tiny_model)["text"]
    drawn = ("--temperature", "1.5", "--seed", "1")
    assert ask(capsys, model, *drawn)["text"] == ask(capsys, tiny_model, *drawn)["text"]


def test_answers_keep_to_a_schema(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("llguidance")
    schema, rows, out = tmp_path / "schema.json", tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    schema.write_text(json.dumps({"type": "array", "items": {"type": "boolean"}, "maxItems": 2}), encoding="utf-8")
    found = ask(capsys, tiny_model, "--json-schema", str(schema), "--max-new-tokens", "200", "--temperature", "1")
    assert found["stopped"] is True
    assert all(isinstance(value, bool) for value in json.loads(found["text"]))
    rows.write_text('{"prompt": "a"}\n{"prompt": "b"}\n', encoding="utf-8")
    argv = ["generate", "--model", str(tiny_model), "--input", str(rows), "--output", str(out), "--temperature", "1"]
    assert main([*argv, "--json-schema", str(schema)]) == 0
    for line in out.read_text(encoding="utf-8").splitlines():
        assert all(isinstance(value, bool) for value in json.loads(json.loads(line)["answer"]))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "can't be read"),
        ("[1]", "holds no schema"),
        ('{"not": {}}', "no answer can have this form"),
        (None, "No such"),
    ],
)
def test_a_schema_that_is_none_is_refused(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, said: str
) -> None:
    pytest.importorskip("llguidance")
    if text is not None:
        (tmp_path / "schema.json").write_text(text, encoding="utf-8")
    argv = ["generate", "--model", str(tiny_model), "--prompt", "x", "--json-schema", str(tmp_path / "schema.json")]
    assert main(argv) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_an_adapter_of_another_base_is_refused(
    adapter: Path, tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    assert main(["generate", "--model", str(model), "--adapter", str(adapter), "--prompt", "x"]) == 2
    text = capsys.readouterr().err
    assert "was trained on other weights than those in" in text
    assert "--allow-mismatch base" in text


def test_an_empty_prompt_without_a_start_token_is_refused(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--model", str(tiny_model), "--prompt", "", "--template", "none"]) == 2
    assert "--prompt is empty" in capsys.readouterr().err


def test_a_prompt_beyond_the_context_is_refused(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--model", str(tiny_model), "--prompt", "a" * 300]) == 2
    assert "tokens, and the model was made for at most 256" in capsys.readouterr().err


@needs_stories
@pytest.mark.parametrize("number", range(4))
def test_a_trained_model_says_what_its_authors_program_says(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    golden = json.loads((STORIES / "golden.json").read_text(encoding="utf-8"))["greedy"][number]
    flags = ["--template", "none", "--max-new-tokens", str(golden["max_new_tokens"]), "--dtype", "float32"]
    found = ask(capsys, STORIES, *flags, prompt=golden["prompt"])
    assert found["prompt_tokens"] == len(golden["prompt_ids"])
    stop = golden["stopped_on_token"] is not None
    assert found["stopped"] is stop
    assert found["new_tokens"] == len(golden["new_ids"]) + (
        stop and golden["new_ids"][-1] != golden["stopped_on_token"]
    )
    speaker = load_speaker(GenerateConfig(model=str(STORIES), prompt="x", template="none"), Screen())
    assert found["text"] == speaker.tokenizer.hf.decode(golden["new_ids"], skip_special_tokens=True)
    assert speaker.prompt_ids(golden["prompt"]) == golden["prompt_ids"]


def test_an_answer_ends_where_the_context_does(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """GPT-2 has no positions behind its context at all."""
    shape = {"n_positions": 32, "n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 259}
    with torch.random.fork_rng():
        torch.manual_seed(1)  # of some other weights, the draws could end in a stop token before the context does
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, bos_token_id=None, eos_token_id=256))
    transformers.logging.disable_progress_bar()
    model.save_pretrained(tmp_path / "gpt2")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / file, tmp_path / "gpt2" / file)
    flags = ["--template", "none", "--max-new-tokens", "60", "--temperature", "1.5"]
    argv = ["generate", "--model", str(tmp_path / "gpt2"), "--prompt", "a" * 20, *flags, "--json"]
    assert main(argv) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out.rstrip("\n").rpartition("\n")[2])
    assert (found["new_tokens"], found["stopped"]) == (12, False)
    assert "cut at the model's context of 32 tokens" in " ".join(shown.err.split())
