"""Whole commands that can't go on: exit code 2, one block that says what, what was expected, and the way out."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from packaging.version import Version

from truetune.cli.main import main

CHECKS_CONFIGS = Version(transformers.__version__) >= Version("5.4")  # before, a wrong type is met in the arithmetic


class Shop:
    """A copy of the tiny model to break, and the command that meets it."""

    def __init__(self, folder: Path, model: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.model, self.data, self.capsys = folder / "model", data, capsys
        self.out = folder / "out"
        shutil.copytree(model, self.model)

    def config(self, **changes: Any) -> None:
        path = self.model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")

    def run(self, *flags: str, model: str | None = None, code: int = 2) -> str:
        argv = ["sft", "--model", model or str(self.model), "--data", str(self.data), "--out", str(self.out)]
        assert main([*argv, "--max-steps", "1", "--batch-size", "4", *flags]) == code
        seen = self.capsys.readouterr()
        assert "Traceback" not in seen.err
        assert seen.out == ""
        return seen.err.replace(str(self.model.parent), "DIR")

    def refusal(self, *flags: str, model: str | None = None) -> str:
        """The error's block; the run left nothing behind."""
        text = self.run(*flags, model=model)
        assert text.count("error: ") == 1
        assert not self.out.exists()
        return text[text.index("error: ") :]


@pytest.fixture
def shop(tmp_path: Path, tiny_model: Path, alpaca_file: Path, capsys: pytest.CaptureFixture[str]) -> Shop:
    return Shop(tmp_path, tiny_model, alpaca_file, capsys)


def test_a_wrong_path_names_the_nearest_folder(shop: Shop) -> None:
    text = shop.refusal(model=str(shop.model.with_name("modle")))
    assert text.startswith("error: --model: there is no folder DIR/modle\n  did you mean   DIR/model\n")


def test_a_wrong_relative_path_is_not_asked_of_the_hub(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shop.model.parent.parent)
    name = f"{shop.model.parent.name}/modell"
    assert f"there is no folder {name}\n  did you mean   {shop.model.parent.name}/model" in shop.refusal(model=name)


def test_a_hub_name_without_a_network_is_told_at_once(shop: Shop) -> None:
    text = shop.refusal(model="nobody/has-this")
    assert "there is no folder nobody/has-this, and the Hub can't be asked for it" in text
    assert len(text) < 300


def test_a_file_as_model_is_refused(shop: Shop) -> None:
    assert "is a file, not a folder" in shop.refusal(model=str(shop.model / "model.safetensors"))


def test_an_adapter_as_model_is_recognised(shop: Shop) -> None:
    shop.run(code=0)
    adapter, shop.out = shop.out / "adapter", shop.out.with_name("second")
    text = shop.refusal(model=str(adapter))
    assert "holds no model: it has no config.json\n  it is      an adapter; pass its base as --model" in text


def test_the_folder_above_a_model_is_told_so(shop: Shop) -> None:
    assert "did you mean   DIR/model" in shop.refusal(model=str(shop.model.parent))


def test_a_folder_without_a_tokenizer_is_refused(shop: Shop) -> None:
    (shop.model / "tokenizer.json").unlink()
    text = shop.refusal()
    assert "--model: DIR/model has no tokenizer\n  expected   tokenizer.json" in text
    assert "way out" in text


def test_a_damaged_tokenizer_is_refused(shop: Shop) -> None:
    (shop.model / "tokenizer.json").write_text("{", encoding="utf-8")
    assert "the tokenizer of DIR/model can't be loaded" in shop.refusal()


def test_missing_tensors_are_named(shop: Shop) -> None:
    shop.config(num_hidden_layers=3)
    text = shop.refusal()
    assert "the weights in DIR/model do not fill the model that its config.json describes" in text
    assert "missing    model.layers.2.mlp.up_proj.weight" in text


def test_misshaped_tensors_are_named_with_both_shapes(shop: Shop) -> None:
    shop.config(intermediate_size=40)
    assert "misshaped  model.layers.1.mlp.up_proj.weight: found [48, 32], expected [40, 32]" in shop.refusal()


def test_tensors_without_a_place_are_said(shop: Shop) -> None:
    shop.config(num_hidden_layers=1)
    text = " ".join(shop.run(code=0).split())
    assert "warning 9 tensors in DIR/model are not used, its config.json has no place for them: model.layers.1" in text


def test_a_folder_without_weights_is_refused(shop: Shop) -> None:
    (shop.model / "model.safetensors").unlink()
    assert "--model: DIR/model has no weights\n  expected   model.safetensors" in shop.refusal()


def test_a_missing_part_of_the_weights_is_named(shop: Shop) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (shop.model / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (shop.model / "model.safetensors").rename(shop.model / "model-00001-of-00002.safetensors")
    text = shop.refusal()
    assert "lacks a part of its weights\n  missing    model-00002-of-00002.safetensors" in text


def test_a_truncated_weight_file_is_refused(shop: Shop) -> None:
    path = shop.model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "model.safetensors: cut off" in shop.refusal()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{ not json", "config.json can't be read as JSON: Expecting property name"),
        ("[]", "config.json does not say what kind of model it describes"),
        ("{}", "config.json does not say what kind of model it describes"),
        ('{"model_type": "lama"}', "knows no architecture 'lama'\n  did you mean   llama"),
        (
            '{"model_type": "llama", "hidden_size": "big"}',
            "Field 'hidden_size' expected int, got str" if CHECKS_CONFIGS else "for //: 'str' and 'int'",
        ),
        ('{"model_type": "t5"}', "is of the kind 't5', which is no causal language model"),
        ('{"model_type": "own", "auto_map": {"AutoConfig": "x.X"}}', "needs code of its own to be run"),
    ],
)
def test_a_config_that_describes_no_usable_model_is_refused(shop: Shop, content: str, said: str) -> None:
    (shop.model / "config.json").write_text(content, encoding="utf-8")
    assert said in shop.refusal()


def test_code_beside_a_known_architecture_is_never_run(shop: Shop) -> None:
    shop.config(auto_map={"AutoConfig": "planted.X", "AutoModelForCausalLM": "planted.Y"})
    (shop.model / "planted.py").write_text("raise SystemExit('code from the folder was run')", encoding="utf-8")
    shop.run(code=0)


def test_without_a_template_the_built_in_ones_are_named(shop: Shop) -> None:
    (shop.model / "chat_template.jinja").unlink()
    text = shop.refusal()
    assert "the tokenizer has no chat template, and truetune does not guess one" in text
    assert "--template alpaca" in text
    assert re.search(r"known +alpaca, chatml, .*plain", text)


def test_an_unknown_template_names_the_nearest(shop: Shop) -> None:
    text = shop.refusal("--template", "alapca")
    assert "'alapca' is neither a built-in template nor a file\n  did you mean   alpaca" in text


def test_chatml_needs_its_tokens(
    shop: Shop, make_tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (shop.model / "tokenizer.json").read_text(encoding="utf-8").replace("<|im_start|>", "<|other|>")
    (shop.model / "tokenizer.json").write_text(text, encoding="utf-8")
    assert "--template chatml: the tokenizer has no token <|im_start|>" in shop.refusal("--template", "chatml")


def test_a_template_with_a_fault_is_refused(shop: Shop, tmp_path: Path) -> None:
    (tmp_path / "bad.jinja").write_text("{% for m in messages %}{{ m.content }}", encoding="utf-8")
    text = shop.refusal("--template", str(tmp_path / "bad.jinja"))
    assert "chat template" in text
    assert "row 1" in text


def test_a_tokenizer_that_is_larger_than_the_model_is_refused(shop: Shop) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(shop.model))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    tokenizer.chat_template = "<|new|>" + tokenizer.chat_template
    tokenizer.save_pretrained(str(shop.model))
    text = shop.refusal()
    assert "its tokenizer gives token 259 ('<|new|>'), and the model's vocabulary ends at 258" in text


def test_a_target_that_matches_nothing_is_refused(shop: Shop) -> None:
    text = shop.refusal("--targets", "q_porj")
    assert "the model has no layer called 'q_porj'\n  did you mean   q_proj\n  it has         " in text


def test_one_wrong_target_among_several_is_refused(shop: Shop) -> None:
    assert "no layer called 'v_prj'" in shop.refusal("--targets", "q_proj", "v_prj")


def test_a_broken_expression_is_refused(shop: Shop) -> None:
    assert "'(' is no valid regular expression" in shop.refusal("--targets", "(")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--val-split", "0.1", "--val-data", "x.jsonl"], "--val-split and --val-data: each names the held-out rows"),
        (["--val-split", "0.001"], "of 12 rows, 12 would be trained on and 0 held out"),
        (["--dtype", "float16"], "--dtype float16: CPUs compute it slowly"),
        (["--method", "full", "--rank", "8"], "--rank: no setting of --method full"),
        (["--trainable", "bia"], "--trainable: found 'bia', expected bias, norm, embedding, head"),
        (["--trainable", "bias"], "--trainable bias: this model has no bias"),
        (["--revision", "main"], "--revision is for models on the Hub, and --model is a folder here"),
        (["--max-length", "4096"], "the model was made for at most 256 tokens"),
        (["--max-length", "20"], "12 of 12 rows are longer than 20 tokens"),
        (["--val-data", "nowhere.jsonl"], "nowhere.jsonl: no such file or folder"),
        (["--resume", "nowhere"], "--resume: nowhere is no checkpoint"),
        (["--rank", "99999999999"], "less to train: a lower --rank"),
        (["--epochs", "1e30"], "--epochs"),
    ],
)
def test_settings_that_do_not_fit_are_refused(shop: Shop, flags: list[str], said: str) -> None:
    assert said in shop.refusal(*flags)


def test_held_out_rows_that_are_left_out_are_counted(shop: Shop, tmp_path: Path) -> None:
    good = {"instruction": "a", "output": "b"}
    path = tmp_path / "val.jsonl"
    path.write_text(f'{json.dumps(good)}\n{{"instruction": "c"}}\n', encoding="utf-8")
    shop.run("--val-data", str(path), "--max-bad-rows", "1", code=0)
    report = json.loads((shop.out / "data" / "report.json").read_text(encoding="utf-8"))
    assert report["held_out"]["rejected"] == {"missing_field": 1}
    assert report["read"] == report["used"] + sum(report["rejected"].values()) == 12
    assert "val.jsonl" in (shop.out / "data" / "rejects.jsonl").read_text(encoding="utf-8")


def test_held_out_rows_that_are_all_left_out_are_an_error(shop: Shop, tmp_path: Path) -> None:
    path = tmp_path / "val.jsonl"
    path.write_text(json.dumps({"instruction": "a" * 900, "output": "b"}) + "\n", encoding="utf-8")
    text = shop.refusal("--val-data", str(path))
    assert "val.jsonl is left to hold out" in text


def test_no_data_at_all_names_the_flag(capsys: pytest.CaptureFixture[str], tiny_model: Path) -> None:
    assert main(["sft", "--model", str(tiny_model), "--data"]) == 2
    assert "--data needs a value" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["merge", "generate"])
def test_an_adapter_folder_that_is_none_is_refused(
    command: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = ["--out", str(tmp_path / "o")] if command == "merge" else ["--prompt", "x"]
    assert main([command, "--model", str(tiny_model), "--adapter", str(tmp_path / "none"), *extra]) == 2
    text = capsys.readouterr().err
    assert "error: " in text
    assert "adapter" in text
    assert "Traceback" not in text
