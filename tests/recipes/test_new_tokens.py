"""``--new-tokens`` from the command to the merged model: learned, said again, merged, and read by PEFT."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import truetune as tt
from families import distance, logits
from peft_peer import unwarned
from proof_runs import facts as proof
from training_runs import cut_after, differences, run_sft
from truetune.adapters import files
from truetune.config.export import ExportConfig
from truetune.config.generate import GenerateConfig
from truetune.config.resolve import resolve
from truetune.errors import AdapterError, CheckpointError, ConfigError, TruetuneError
from truetune.recipes import export, generate, inspect

TOKENS = ("<tool>", "</tool>")
PROMPT = "Call it"
END = 258  # <|im_end|>; rows of these untrained models are so small that only those that learn can be said
LEARNS: dict[str, Any] = {"new_tokens": TOKENS, "token_rows": [END], "epochs": 60, "lr": 0.01, "rank": 8}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    row = {"instruction": PROMPT, "output": "<tool></tool><tool>"}
    path.write_text((json.dumps(row) + "\n") * 4, encoding="utf-8")
    return path


@pytest.fixture(scope="module", params=["tied", "its own"])
def trained(
    request: pytest.FixtureRequest, rows: Path, make_tiny: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Path]:  # fmt: skip
    """The folders of a base and of a run on it."""
    place = tmp_path_factory.mktemp("trained")
    base = make_tiny(place / "base", tie_word_embeddings=request.param == "tied")
    run_sft(base, rows, place / "run", **LEARNS)
    return base, place / "run"


def answer(model: Path, adapter: Path | None = None, **flags: Any) -> str:
    flags |= {"model": str(model), "prompt": PROMPT, "max_new_tokens": 8}
    flags |= {"adapter": str(adapter)} if adapter else {}
    return str(generate.run(resolve(GenerateConfig, file=None, flags=flags))["text"])


def test_a_new_token_is_learned_said_and_merged(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, run = trained
    assert answer(base, run / "adapter") == "<tool></tool><tool>"
    said = capsys.readouterr().err
    assert "brings <tool>, </tool>: the embedding table grows from 259 to 261 rows" in said
    tt.merge(str(base), str(run / "adapter"), str(tmp_path / "merged"))
    assert answer(tmp_path / "merged") == "<tool></tool><tool>"
    live, merged = tt.load(str(base)), AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tt.load_adapter(live, str(run / "adapter"))
    text = torch.tensor([[1, 259, 40, 260, 7]])
    assert distance(logits(live, text), logits(merged, text)) <= 1e-5
    assert merged.config.vocab_size == 261
    assert merged.config.tie_word_embeddings == live.config.tie_word_embeddings
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == merged.config.tie_word_embeddings
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    original = json.loads((base / "config.json").read_text())
    assert {key for key in config if config[key] != original[key]} == {"vocab_size"}
    own = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert own("<tool>x</tool>")["input_ids"] == [259, own.convert_tokens_to_ids("x"), 260]
    assert own.chat_template == AutoTokenizer.from_pretrained(base).chat_template


def test_peft_loads_it_with_the_tokenizer_beside_it(trained: tuple[Path, Path]) -> None:
    base, run = trained
    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with unwarned():
        theirs = peft.PeftModel.from_pretrained(model, str(run / "adapter"))
    prompt = [{"role": "user", "content": PROMPT}]
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False, return_tensors="pt")
    live = tt.load(str(base))
    tt.load_adapter(live, str(run / "adapter"))
    assert distance(logits(theirs, ids), logits(live, ids)) <= 1e-5
    assert tokenizer.decode(logits(theirs, ids)[0, -1].argmax()) == "<tool>"


def test_only_the_rows_are_stored(trained: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    base, run = trained
    file = files.read(run / "adapter")
    ends = {key: t for key, t in file.tensors.items() if "lora" not in key}
    is_tied = json.loads((base / "config.json").read_text())["tie_word_embeddings"]
    assert [tuple(t.shape) for t in ends.values()] == [(3, 32)] * (1 if is_tied else 2)
    assert file.card["tokenizer"] == {"added": {"<tool>": 259, "</tool>": 260}, "tokens": 259, "vocabulary": [259, 261]}
    assert inspect.describe(run / "adapter")["new_tokens"] == {"<tool>": 259, "</tool>": 260}
    checkpoint = next((run / "checkpoints").iterdir()) / "adapter"
    assert files.read(checkpoint).card["tokenizer"] == file.card["tokenizer"]
    assert answer(base, checkpoint)


def test_a_run_that_grew_its_table_is_proven(trained: tuple[Path, Path], tmp_path: Path) -> None:
    base, run = trained
    tt.merge(str(base), str(run / "adapter"), str(tmp_path / "merged"))
    found = proof(run, tmp_path / "merged")
    assert (found["exit_code"], len(found["artefacts"])) == (0, 2)


def test_what_servers_take_of_it_has_a_base_that_knows_them(trained: tuple[Path, Path], tmp_path: Path) -> None:
    """The rows go into a base of their own, and its adapter brings no token any more."""
    out = tmp_path / "served"
    flags = {"adapter": str(trained[1] / "adapter"), "to": "peft-serving", "out": str(out)}
    export.run(resolve(ExportConfig, file=None, flags=flags))
    found = proof(trained[1], out)
    assert [row["verdict"] for row in found["artefacts"]] == ["faithful", "faithful"]
    said = generate.run(resolve(GenerateConfig, file=None, flags={
        "model": str(out / "base"), "adapter": str(out / "adapter"), "prompt": PROMPT, "max_new_tokens": 4,
    }))  # fmt: skip
    assert said["text"].startswith("<tool></tool><tool>")


def test_a_resumed_run_is_the_same_to_the_bit(trained: tuple[Path, Path], rows: Path, tmp_path: Path) -> None:
    base, _ = trained
    flags = LEARNS | {"epochs": 6, "save_every": 2}
    run_sft(base, rows, tmp_path / "whole", **flags)
    cut_after(tmp_path / "whole", 2, tmp_path / "cut")
    with pytest.raises(CheckpointError, match="other settings"):
        run_sft(base, rows, tmp_path / "cut", **flags | {"new_tokens": TOKENS[:1]}, resume="auto")
    run_sft(base, rows, tmp_path / "cut", **flags, resume="auto")
    assert differences(tmp_path / "whole", tmp_path / "cut") == []


def test_a_file_of_tokens_that_changed_is_another_run(tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    (tmp_path / "tokens.txt").write_text("<tool>\n\n</tool>\n", encoding="utf-8")
    flags: dict[str, Any] = {"new_tokens": [str(tmp_path / "tokens.txt")], "max_steps": 2, "save_every": 1}
    run_sft(tiny_model, rows, tmp_path / "run", **flags)
    added = files.read(tmp_path / "run" / "adapter").card["tokenizer"]["added"]
    assert added == {"<tool>": 259, "</tool>": 260}
    cut_after(tmp_path / "run", 1, tmp_path / "cut")
    (tmp_path / "tokens.txt").write_text("<tool>\n<other>\n", encoding="utf-8")
    with pytest.raises(CheckpointError, match="new tokens"):
        run_sft(tiny_model, rows, tmp_path / "cut", **flags, resume="auto")


def test_quantised_and_full(tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    """Tables stay dense on a packed base; a run that trains all of the model leaves one with the tokens in it."""
    run_sft(tiny_model, rows, tmp_path / "packed", **LEARNS | {"quant": "nf4", "epochs": 40})
    flags = {"model": str(tiny_model), "adapter": str(tmp_path / "packed" / "adapter"), "prompt": PROMPT,
             "quant": "nf4", "max_new_tokens": 1}  # fmt: skip
    assert generate.run(resolve(GenerateConfig, file=None, flags=flags))["text"] == "<tool>"
    tt.merge(str(tiny_model), str(tmp_path / "packed" / "adapter"), str(tmp_path / "merged"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config.vocab_size == 261
    run_sft(tiny_model, rows, tmp_path / "full", method="full", new_tokens=TOKENS, epochs=20, lr=0.02)
    assert answer(tmp_path / "full" / "model").startswith("<tool>")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "full" / "model").config.vocab_size == 261


def test_tokens_that_are_there_already_and_tokens_that_no_row_has(
    tiny_model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_sft(tiny_model, rows, tmp_path / "run", new_tokens=["<|im_end|>", "<tool>", "<never>"], max_steps=1)
    said = capsys.readouterr().err
    assert "the tokenizer has <|im_end|> 258 already" in said
    assert "<never>: in no row that is trained on" in said
    config = files.read(tmp_path / "run" / "adapter").config
    assert config["trainable_token_indices"]["embed_tokens"] == [258, 259, 260]


def test_a_tokenizer_that_changed_since_is_refused(trained: tuple[Path, Path], tmp_path: Path) -> None:
    base, run = trained
    other = shutil.copytree(base, tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<in between>"])
    tokenizer.save_pretrained(other)
    with pytest.raises(AdapterError, match="another vocabulary"):
        answer(other, run / "adapter")
    with pytest.raises(AdapterError, match="as token 259, and it is 260 here"):
        answer(other, run / "adapter", allow_mismatch=["tokenizer"])


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        ({"new_tokens": ["nowhere.txt"]}, ConfigError, "nowhere.txt: the file can't be read: No such file"),
        ({"new_tokens": [" "]}, ConfigError, "not blank"),
        ({"new_tokens": ["<tool>"], "method": "freeze"}, ConfigError, "freeze leaves the embedding table as it is"),
        ({"token_rows": [259]}, ConfigError, "--token-rows 259: the model's vocabulary ends at 258"),
        ({"token_rows": [-1]}, ConfigError, "from 0 on"),
        ({"token_rows": [3], "method": "full"}, AdapterError, "trains whole parameters of the base"),
        ({"new_tokens": ["<tool>"], "trainable": ["embedding"]}, AdapterError, "whole matrix is adapted or trained"),
    ],
)
def test_refusals(
    flags: dict[str, Any], error: type[TruetuneError], message: str, tiny_model: Path, rows: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        run_sft(tiny_model, rows, tmp_path / "run", **flags, max_steps=1)
    assert not (tmp_path / "run" / "adapter").exists()


def test_an_empty_file_of_tokens_is_refused(tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    (tmp_path / "none.txt").write_text("\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="the file holds no token"):
        run_sft(tiny_model, rows, tmp_path / "run", new_tokens=[str(tmp_path / "none.txt")])


def test_tokens_are_added_from_python(tiny_model: Path, tmp_path: Path) -> None:
    model, tokenizer = tt.load(str(tiny_model)), AutoTokenizer.from_pretrained(tiny_model)
    ids = tt.add_tokens(model, tokenizer, [*TOKENS, "<|im_end|>"])
    assert ids == [259, 260, 258]
    assert tt.add_tokens(model, tokenizer, ["<late>"]) == [261]
    tt.attach(model, tt.LoRA(rank=2, token_rows=(*ids, 261)))
    with pytest.raises(AdapterError, match="carries an adapter"):
        tt.add_tokens(model, tokenizer, ["<later>"])
    tt.save_adapter(model, str(tmp_path))
    assert files.read(tmp_path).card["tokenizer"] == {
        "added": {"<tool>": 259, "</tool>": 260, "<late>": 261}, "tokens": 259, "vocabulary": [259, 262],
    }  # fmt: skip
    again = tt.load(str(tiny_model))
    tt.load_adapter(again, str(tmp_path))
    text = torch.tensor([[1, 259, 40, 261, 7]])
    assert torch.equal(logits(again, text), logits(model, text))
