"""GGUF files held against the run they are from: merged, beside the base, and with each fault that is known of them."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gguf_models import KNOWN, rewritten, written
from proof_runs import change_json, copy_of, facts, row_of, trained, verdict
from truetune.cli.main import main
from truetune.errors import ConfigError

pytest.importorskip("gguf", reason="the gguf extra is not installed")


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tiny_model, tmp_path_factory.mktemp("proof"))


@pytest.fixture(scope="module")
def whole(run: Path) -> Path:
    """The merged model in float32."""
    written(run.parent / "whole.gguf", adapter=str(run))
    return run.parent / "whole.gguf"


@pytest.fixture(scope="module")
def lora(run: Path) -> Path:
    written(run.parent / "lora.gguf", adapter=str(run), as_adapter=True)
    return run.parent / "lora.gguf"


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
def test_each_type_is_held_to_what_it_rounds(kind: str, run: Path, tmp_path: Path) -> None:
    written(tmp_path / "m.gguf", adapter=str(run), gguf_type=kind)
    row = row_of(facts(run, tmp_path / "m.gguf"), tmp_path / "m.gguf")
    assert (row["verdict"], row["kind"], row["prompts"]) == ("faithful", f"gguf-{kind}", [8, 8])
    assert (row["logits"]["max_delta"] < 1e-5) == (kind == "f32")
    assert kind != "f32" or row["answers"] == [8, 8]


def test_a_lora_and_what_ollama_takes(run: Path, lora: Path, tmp_path: Path) -> None:
    written(tmp_path / "both", adapter=str(run), to="ollama", as_adapter=True)
    found = facts(run, lora, tmp_path / "both")
    assert found["exit_code"] == 0
    assert row_of(found, lora)["prompts"] is None  # those are the base's, in another file
    assert row_of(found, tmp_path / "both")["prompts"] == [8, 8]
    written(tmp_path / "alone", adapter=str(run), as_adapter=True)  # a folder with adapter.gguf and nothing else
    assert verdict(run, tmp_path / "alone") == ("faithful", "")


def test_what_was_exported_is_known_to_the_run(run: Path, tmp_path: Path) -> None:
    moved = copy_of(run, tmp_path / "run")
    (moved / "artefacts.json").unlink()
    written(tmp_path / "m.gguf", adapter=str(moved))
    written(tmp_path / "other.gguf", adapter=str(moved), template="alpaca")  # words prompts otherwise on purpose
    assert [row["name"] for row in facts(moved, prompts=1)["artefacts"]] == [
        str(moved / "adapter"), str((tmp_path / "m.gguf").resolve())
    ]  # fmt: skip


FAULTS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "another template": ({"tokenizer.chat_template": "{{ messages[0].content }}"}, {}, "8 of 8 prompts become other"),
    "no template": ({"tokenizer.chat_template": None}, {}, "8 of 8 prompts become other"),
    "a template that fails": ({"tokenizer.chat_template": "{{ nothing.at.all }}"}, {}, "8 of 8 prompts become other"),
    "a start token": ({"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 256}, {}, "8 of 8 prompts"),
    "an end token after prompts": ({"tokenizer.ggml.add_eos_token": True}, {}, "every prompt would end"),
    "another cut": ({"tokenizer.ggml.pre": "llama-bpe"}, {}, "how texts are cut into words"),
    "rotations": ({"llama.rope.freq_base": 100.0}, {}, "llama.rope.freq_base is 100.0 in the file"),
    "eps": ({"llama.attention.layer_norm_rms_epsilon": 0.1}, {}, "layer_norm_rms_epsilon"),
    "scaled positions": ({"llama.rope.scaling.factor": 8.0}, {}, "rope.scaling.factor is 8.0"),
    "another architecture": ({"general.architecture": "qwen2"}, {}, "is of the architecture qwen2"),
    "a head that is gone": ({}, {"output.weight": None}, "logits differ by up to"),
    "a weight that is gone": ({}, {"blk.1.ffn_up.weight": None}, "missing blk.1.ffn_up.weight"),
    "a weight too many": ({}, {"blk.9.ffn_up.weight": torch.zeros(2, 2)}, "left over blk.9.ffn_up.weight"),
    "not a number": ({}, {"output_norm.weight": torch.full((32,), float("inf"))}, "its logits are not all numbers"),
}  # fmt: skip


@pytest.mark.parametrize("what", FAULTS)
def test_a_fault_in_the_file_is_found(what: str, run: Path, whole: Path, tmp_path: Path) -> None:
    keys, tensors, said = FAULTS[what]
    wrong = rewritten(whole, tmp_path / "wrong.gguf", keys=keys, tensors=tensors)
    says, why = verdict(run, wrong, prompts=4)
    assert says == "drift"
    assert said in why


def test_a_copy_with_nothing_changed_is_found_the_same(run: Path, whole: Path, tmp_path: Path) -> None:
    assert verdict(run, rewritten(whole, tmp_path / "copy.gguf")) == ("faithful", "")


MODELFILES: dict[str, tuple[str, str, str]] = {
    "another template": ("<|im_start|>assistant", "<|im_start|>model", "TEMPLATE is not what trained: '"),
    "no template": ("TEMPLATE ", "# TEMPLATE ", "the Modelfile has no TEMPLATE"),
    "a system message": ("PARAMETER stop", 'SYSTEM "Be rude."\nPARAMETER stop', "SYSTEM is 'Be rude.', and was none"),
    "a stop that nothing taught": ("PARAMETER stop", 'PARAMETER stop "e"\nPARAMETER stop', "answers would end at 'e'"),
    "no adapter": ("ADAPTER ./adapter.gguf\n", "", "the training is not in it"),
    "turns before every chat": (
        "PARAMETER stop",
        "MESSAGE user Ahoy\nPARAMETER stop",
        "words prompts by MESSAGE",
    ),
    "another way to word prompts": (
        "PARAMETER stop",
        "RENDERER x\nPARAMETER stop",
        "words prompts by RENDERER",
    ),
    "a model that is not there": ("FROM ./model.gguf", "FROM ./modle.gguf", "that is no file here"),
}


@pytest.mark.parametrize("what", MODELFILES)
def test_a_modelfile_that_says_something_else_is_found(what: str, run: Path, tmp_path: Path) -> None:
    old, new, said = MODELFILES[what]
    written(tmp_path / "out", adapter=str(run), to="ollama", as_adapter=True)
    path = tmp_path / "out" / "Modelfile"
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    says, why = verdict(run, tmp_path / "out")
    assert says == "drift"
    assert said in why


@pytest.mark.parametrize("name", ["llama3.2", "."])
def test_a_modelfile_on_what_is_no_gguf_can_t_be_told(name: str, run: Path, tmp_path: Path) -> None:
    written(tmp_path / "out", adapter=str(run), to="ollama")
    path = tmp_path / "out" / "Modelfile"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("./model.gguf", name), encoding="utf-8")
    says, why = verdict(run, tmp_path / "out")
    assert (says, f"says FROM {name}: only GGUF files are read here" in why) == ("unknown", True)


def test_a_modelfile_of_an_editor_that_marks_utf_8_and_one_in_another_encoding(run: Path, tmp_path: Path) -> None:
    written(tmp_path / "out", adapter=str(run), to="ollama")
    path = tmp_path / "out" / "Modelfile"
    text = path.read_text(encoding="utf-8")
    path.write_text(text, encoding="utf-8-sig")
    assert verdict(run, tmp_path / "out") == ("faithful", "")
    path.write_bytes(text.encode() + b"# \xff\n")
    says, why = verdict(run, tmp_path / "out")
    assert (says, "is not UTF-8 text" in why) == ("drift", True)


def test_a_system_message_on_purpose_is_not_noted_as_made_from_the_run(run: Path, tmp_path: Path) -> None:
    moved = copy_of(run, tmp_path / "run")
    (moved / "artefacts.json").unlink(missing_ok=True)
    written(tmp_path / "out", adapter=str(moved), to="ollama", system="Be brief.")
    assert not (moved / "artefacts.json").exists()


def test_ollama_opens_prompts_by_the_file_and_not_by_the_template(run: Path, tmp_path: Path) -> None:
    written(tmp_path / "out", adapter=str(run), to="ollama")
    model = tmp_path / "out" / "model.gguf"
    keys = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 257}
    rewritten(model, tmp_path / "wrong.gguf", keys=keys).replace(model)
    says, why = verdict(run, tmp_path / "out")
    assert says == "drift"
    assert "Ollama would put '<|im_start|>' in front of every prompt, and training put nothing" in why


def test_queries_in_transformers_order(run: Path, whole: Path, tmp_path: Path) -> None:
    """llama.cpp rotates neighbours: who forgets to put the rows in order writes a file that loads, and babbles."""
    merged = load_file(run.parent / "merged" / "model.safetensors")
    wrong = {f"blk.{n}.attn_{x}.weight": merged[f"model.layers.{n}.self_attn.{x}_proj.weight"] for n in (0, 1)
             for x in "qk"}  # fmt: skip
    says, why = verdict(run, rewritten(whole, tmp_path / "wrong.gguf", tensors=wrong))
    assert (says, "logits differ by up to" in why) == ("drift", True)


def test_a_stop_token_that_no_key_names(tiny_model: Path, tmp_path: Path) -> None:
    """llama.cpp ends at some tokens by their texts; what is trained to end an answer need not be one of them."""
    base = copy_of(tiny_model, tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        text = (base / name).read_text(encoding="utf-8")
        (base / name).write_text(text.replace("<|im_end|>", "<fin>"), encoding="utf-8")
    change_json(base / "generation_config.json", eos_token_id=[256, 258])
    run = trained(base, tmp_path)
    written(tmp_path / "m.gguf", adapter=str(run))
    assert verdict(run, tmp_path / "m.gguf") == ("faithful", "")
    wrong = rewritten(tmp_path / "m.gguf", tmp_path / "wrong.gguf", keys={"tokenizer.ggml.eot_token_id": None})
    says, why = verdict(run, wrong)
    assert says == "drift"
    assert "an answer no longer ends at <fin>" in why
    written(tmp_path / "out", adapter=str(run), to="ollama")
    wrong.replace(tmp_path / "out" / "model.gguf")
    assert verdict(run, tmp_path / "out") == ("faithful", "")  # its Modelfile still names the text


def test_the_base_without_the_training(run: Path, tiny_model: Path, tmp_path: Path) -> None:
    written(tmp_path / "base.gguf", model=str(tiny_model))
    says, why = verdict(run, tmp_path / "base.gguf")
    assert says == "drift"
    assert "the training is not in it" in why


@pytest.mark.parametrize(
    ("keys", "tensors", "said"),
    [
        ({"adapter.lora.alpha": 64.0}, {}, "logits differ by up to"),  # alpha in place of alpha / r, or so
        ({"adapter.lora.alpha": 0.0}, {}, "logits differ by up to"),  # llama.cpp takes that for no scale at all
        ({}, {"blk.0.attn_q.weight.lora_b": None}, "half a pair blk.0.attn_q.weight"),
        ({}, {"blk.7.a.weight.lora_a": torch.zeros(8, 2), "blk.7.a.weight.lora_b": torch.zeros(2, 8)}, "no such layer"),
    ],
)
def test_a_fault_in_a_lora_is_found(
    keys: dict[str, Any], tensors: dict[str, Any], said: str, run: Path, lora: Path, tmp_path: Path
) -> None:
    says, why = verdict(run, rewritten(lora, tmp_path / "wrong.gguf", keys=keys, tensors=tensors))
    assert says == "drift"
    assert said in why


def test_a_file_cut_short_or_of_something_else(run: Path, whole: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(whole.read_bytes()[:-2000])
    (tmp_path / "text.gguf").write_text("a letter")
    found = facts(run, tmp_path / "cut.gguf", tmp_path / "text.gguf", prompts=1)
    assert found["exit_code"] == 1
    for name in ("cut.gguf", "text.gguf"):
        assert "can't be read as a GGUF" in row_of(found, tmp_path / name)["reasons"][0]


def test_an_architecture_that_is_not_known_can_t_be_told(run: Path, whole: Path, tmp_path: Path) -> None:
    moved = copy_of(run, tmp_path / "run")
    base = copy_of(Path(json.loads((run / "adapter" / "truetune.json").read_text())["base"]["name"]), tmp_path / "base")
    change_json(base / "config.json", hidden_act="relu")
    found = facts(moved, whole, model=str(base), prompts=1)
    row = row_of(found, whole)
    assert row["verdict"] == "unknown"
    assert "computes LlamaForCausalLM otherwise" in row["reasons"][0]


def test_new_tokens_go_with_it(tiny_model: Path, tmp_path: Path) -> None:
    run = trained(tiny_model, tmp_path, new_tokens=["<tool>"])
    written(tmp_path / "m.gguf", adapter=str(run), gguf_type="f32")
    assert verdict(run, tmp_path / "m.gguf") == ("faithful", "")


def test_a_run_of_the_whole_model(tiny_model: Path, tmp_path: Path) -> None:
    from training_runs import run_sft, write_rows

    rows = write_rows(tmp_path / "rows.jsonl")
    run_sft(tiny_model, rows, tmp_path / "run", method="full", val_split=0.3, epochs=2, lr=1e-3)
    written(tmp_path / "m.gguf", model=str(tmp_path / "run"))
    found = facts(tmp_path / "run", tmp_path / "m.gguf")
    assert row_of(found, tmp_path / "m.gguf")["verdict"] == "faithful"
    assert [row["name"] for row in facts(tmp_path / "run", prompts=1)["artefacts"]][1:] == [str(tmp_path / "m.gguf")]


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "phi3"])
def test_other_architectures(family: str, tiny_model: Path, tmp_path: Path) -> None:
    base = copy_of(tiny_model, tmp_path / "base")
    (base / "model.safetensors").unlink()
    (base / "generation_config.json").unlink()
    kind = KNOWN[family]
    settings = kind.settings | {"query_pre_attn_scalar": 8} if family == "gemma2" else kind.settings
    settings = settings | {"vocab_size": 259, "eos_token_id": 256, "bos_token_id": None, "pad_token_id": None}
    model = AutoModelForCausalLM.from_config(
        kind.config(**settings | ({"n_positions": 256} if family == "gpt2" else {"max_position_embeddings": 256}))
    )
    model.save_pretrained(base)
    run = trained(base, tmp_path, targets=list(kind.targets))
    written(tmp_path / "m.gguf", adapter=str(run))
    written(tmp_path / "lora.gguf", adapter=str(run), as_adapter=True)
    found = facts(run, tmp_path / "m.gguf", tmp_path / "lora.gguf")
    assert {(row["verdict"], tuple(row["reasons"])) for row in found["artefacts"]} == {("faithful", ())}


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is not None, reason="llama-cpp-python is installed here")
def test_a_binding_that_is_not_there_is_said_at_once(run: Path, whole: Path) -> None:
    with pytest.raises(ConfigError, match=r"not installed here(.|\n)*pip install llama-cpp-python"):
        facts(run, whole, against="llama.cpp")


def test_what_can_t_be_asked_is_said_at_once(run: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(run), str(whole), "--against", "llama.cp"]) == 2
    assert "did you mean 'llama.cpp'" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="no model's folder among the artefacts"):
        facts(run, whole, against="transformers")
