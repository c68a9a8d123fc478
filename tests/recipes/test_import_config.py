"""``truetune import-config``: what other programs' configs say is what ours say, and no key is passed over."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from truetune.cli.main import main
from truetune.config.imports.files import PROGRAMS, read_foreign
from truetune.config.imports.rules import read
from truetune.config.resolve import resolve
from truetune.config.sft import PretrainConfig, SFTConfig
from truetune.errors import ConfigError

LLAMA_FACTORY = """
model_name_or_path: org/base-8b
stage: sft
finetuning_type: lora
lora_rank: 8
lora_target: q_proj,v_proj
quantization_bit: 4
double_quantization: true
dataset: rows/train.json
template: llama3
cutoff_len: 1024
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
val_size: 0.05
eval_strategy: steps
eval_steps: 50
bf16: true
ddp_timeout: 180000000
deepspeed: examples/deepspeed/ds_z3_config.json
max_samples: 1000
"""
AXOLOTL = """
base_model: org/base-1b
load_in_4bit: true
adapter: qlora
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
datasets:
  - path: org/alpaca-rows
    type: alpaca
    split: train
  - path: mine.jsonl
    type: alpaca
dataset_prepared_path: last_run_prepared
val_set_size: 0.1
output_dir: ./outputs/lora-out
sequence_len: 4096
sample_packing: true
train_on_inputs: false
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 4
optimizer: paged_adamw_32bit
lr_scheduler: cosine
learning_rate: 0.0002
warmup_steps: 10
evals_per_epoch: 4
flash_attention: true
wandb_project:
weight_decay: 0.0
special_tokens:
  pad_token: "<|end_of_text|>"
"""
SWIFT = """#!/bin/bash
# 22GB
NPROC_PER_NODE=2 CUDA_VISIBLE_DEVICES=0,1 \\
swift sft \\
    --model Qwen/Qwen2.5-7B-Instruct \\
    --tuner_type lora \\
    --dataset 'AI-ModelScope/alpaca-gpt4-data-zh#500' \\
              rows/self.jsonl \\
    --torch_dtype bfloat16 \\
    --num_train_epochs 1 \\
    --per_device_train_batch_size 1 \\
    --learning_rate 1e-4 \\
    --lora_rank 8 --lora_alpha 32 \\
    --target_modules all-linear \\
    --gradient_accumulation_steps 16 \\
    --save_total_limit=2 \\
    --max_length 2048 \\
    --system 'You are a helpful assistant.' \\
    --warmup_ratio 0.05 \\
    --use_dora
"""
TORCHTUNE = """
output_dir: /tmp/torchtune/lora
model:
  _component_: torchtune.models.llama3_2.qlora_llama3_2_1b
  lora_attn_modules: ['q_proj', 'v_proj', 'output_proj']
  apply_lora_to_mlp: True
  lora_rank: 64
  lora_alpha: 128
tokenizer:
  _component_: torchtune.models.llama3.llama3_tokenizer
  path: /tmp/base/original/tokenizer.model
  max_seq_len: 2000
checkpointer:
  _component_: torchtune.training.FullModelHFCheckpointer
  checkpoint_dir: /tmp/base/
  checkpoint_files: [model.safetensors]
dataset:
  _component_: torchtune.datasets.alpaca_cleaned_dataset
  packed: False
seed: null
batch_size: 4
optimizer:
  _component_: torch.optim.AdamW
  fused: True
  weight_decay: 0.01
  lr: 3e-4
lr_scheduler:
  _component_: torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup
  num_warmup_steps: 100
epochs: 2
gradient_accumulation_steps: 8
dtype: bf16
"""
TRL = """accelerate launch --num_processes 4 -m x
trl sft --model_name_or_path org/base --dataset_name org/chat --dataset_train_split train_sft \\
  --learning_rate 2.0e-4 --num_train_epochs 1 --per_device_train_batch_size 2 --gradient_accumulation_steps 8 \\
  --use_peft --lora_r 32 --lora_alpha 16 --load_in_8bit --assistant_only_loss --output_dir out --eval_steps 10
"""
PEFT = {
    "peft_type": "LORA", "base_model_name_or_path": "org/base", "r": 8, "lora_alpha": 16, "lora_dropout": 0.1,
    "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 4}, "bias": "none", "use_rslora": True,
    "modules_to_save": None, "inference_mode": True, "task_type": "CAUSAL_LM", "init_lora_weights": True,
}  # fmt: skip
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "lf.yaml": (LLAMA_FACTORY, "LLaMA-Factory", {
        "model": "org/base-8b", "rank": 8, "alpha": 16.0, "targets": ("q_proj", "v_proj"), "quant": "nf4",
        "double_quant": True, "data": ("rows/train.json",), "template": "llama3", "max_length": 1024, "batch_size": 16,
        "lr": 1e-4, "epochs": 3.0, "schedule": "cosine", "warmup": 0.1, "val_split": 0.05, "eval_every": 50,
        "dtype": "bfloat16", "seed": 42,
    }),
    "ax.yml": (AXOLOTL, "axolotl", {
        "model": "org/base-1b", "quant": "nf4", "rank": 32, "alpha": 16.0, "dropout": 0.05, "targets": ("all-linear",),
        "data": ("hub:org/alpaca-rows:train", "mine.jsonl"), "format": "alpaca", "template": "alpaca",
        "val_split": 0.1, "max_length": 4096,
        "train_on": "assistant", "batch_size": 8, "epochs": 4.0, "optim": "adamw", "warmup": 10.0, "lr": 2e-4,
    }),
    "run.sh": (SWIFT, "ms-swift", {
        "model": "Qwen/Qwen2.5-7B-Instruct", "method": "dora", "rank": 8, "alpha": 32.0, "batch_size": 32,
        "data": ("hub:AI-ModelScope/alpaca-gpt4-data-zh", "rows/self.jsonl"), "epochs": 1.0, "keep": 2,
        "weight_decay": 0.1, "dropout": 0.05, "system": "You are a helpful assistant.", "warmup": 0.05,
    }),
    "tune.yaml": (TORCHTUNE, "torchtune", {
        "model": "/tmp/base/", "method": "lora", "quant": "nf4", "rank": 64, "alpha": 128.0,
        "targets": ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), "max_length": 2000,
        "data": ("hub:yahma/alpaca-cleaned",), "batch_size": 32, "lr": 3e-4, "weight_decay": 0.01, "warmup": 100.0,
        "epochs": 2.0, "schedule": "cosine", "clip": 0.0, "dtype": "bfloat16", "optim": "adamw",
    }),
    "trl.sh": (TRL, "PEFT and TRL", {
        "model": "org/base", "data": ("hub:org/chat:train_sft",), "lr": 2e-4, "epochs": 1.0, "batch_size": 64,
        "method": "lora", "rank": 32, "alpha": 16.0, "quant": "int8", "train_on": "assistant", "schedule": "linear",
        "max_length": 1024, "eval_every": 0,
    }),
    "adapter_config.json": (json.dumps(PEFT), "PEFT and TRL", {
        "model": "org/base", "rank": 8, "alpha": 16.0, "dropout": 0.1, "targets": ("q_proj", "v_proj"),
        "rank_pattern": ("q_proj=4",), "use_rslora": True, "init": "kaiming",
    }),
}  # fmt: skip


def imported(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert main(["import-config", *argv, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_config_of_another_program_is_one_of_ours(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, program, wanted = CASES[name]
    (tmp_path / name).write_text(text, encoding="utf-8")
    facts = imported(capsys, str(tmp_path / name), "--out", str(tmp_path / "ours.yaml"))
    assert facts["program"] == program
    flags = {} if "data" in wanted else {"data": ("rows.jsonl",)}
    config = resolve(SFTConfig, file=str(tmp_path / "ours.yaml"), flags=flags).config
    assert {field: getattr(config, field) for field in wanted} == wanted
    assert facts["missing"] == ([] if "data" in wanted else ["data"])


@pytest.mark.parametrize("name", CASES)
def test_every_key_has_a_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / name).write_text(CASES[name][0], encoding="utf-8")
    said = read_foreign(tmp_path / name).said
    lines = imported(capsys, str(tmp_path / name))["lines"]
    assert set(said) <= {line["theirs"] for line in lines}
    assert not [line for line in lines if line["kind"] == "unknown"]
    assert all(line["ours"] or line["note"] for line in lines)


def test_a_hash_in_a_word_of_a_command_is_no_comment(tmp_path: Path) -> None:
    command = 'swift sft --model m \\\n --dataset a.jsonl#500 b.jsonl --lora_rank 64 --output_dir "# out" # --seed 1\n'
    (tmp_path / "run.sh").write_text(command, encoding="utf-8")
    said = read_foreign(tmp_path / "run.sh").said
    assert (said["dataset"], said["lora_rank"], said["output_dir"]) == (["a.jsonl#500", "b.jsonl"], "64", "# out")
    assert "seed" not in said


def test_what_is_not_taken_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text(LLAMA_FACTORY + "lora_rnak: 9\ntrust_remote_code: true\n", encoding="utf-8")
    kinds = {line["theirs"]: line["kind"] for line in imported(capsys, str(tmp_path / "c.yaml"))["lines"]}
    assert kinds["lora_rnak"] == "unknown"
    assert kinds["trust_remote_code"] == kinds["max_samples"] == "not taken"
    assert kinds["deepspeed"] == "no effect"
    out = tmp_path / "o.yaml"
    imported(capsys, str(tmp_path / "c.yaml"), "--out", str(out))
    assert "lora_rnak = 9: look up" in out.read_text(encoding="utf-8").partition("# Not among them:")[2]


def test_the_batch_is_that_of_a_step_over_all_devices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text(LLAMA_FACTORY, encoding="utf-8")
    facts = imported(capsys, str(tmp_path / "c.yaml"), "--devices", "3")
    assert facts["settings"]["batch_size"] == 2 * 8 * 3
    notes = {line["note"] for line in facts["lines"] if line["theirs"] == "per_device_train_batch_size"}
    assert notes == {"2 at once × 8 accumulated × 3 devices"}


def test_a_setting_that_ours_refuses_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = LLAMA_FACTORY.replace("val_size: 0.05\n", "")  # evaluations, and nothing to evaluate on
    (tmp_path / "c.yaml").write_text(text.replace("lora_rank: 8", "lora_rank: -1"), encoding="utf-8")
    refused = {line["theirs"]: line for line in imported(capsys, str(tmp_path / "c.yaml"))["lines"]}
    assert "held-out rows" in refused["eval_every"]["note"]
    assert "greater than 0" in refused["rank"]["note"]


def test_raw_text_becomes_pretrain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text(LLAMA_FACTORY.replace("stage: sft", "stage: pt"), encoding="utf-8")
    facts = imported(capsys, str(tmp_path / "c.yaml"), "--out", str(tmp_path / "o.yaml"))
    assert facts["command"] == "pretrain"
    refused = {line["theirs"]: line["note"] for line in facts["lines"] if line["kind"] == "not taken"}
    assert refused["template"] == "no setting of truetune pretrain"  # raw text is not worded as a conversation
    assert resolve(PretrainConfig, file=str(tmp_path / "o.yaml"), flags={}).config.method == "lora"


def test_without_out_the_yaml_is_all_of_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text(AXOLOTL, encoding="utf-8")
    assert main(["import-config", str(tmp_path / "c.yaml")]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["tuning"]["rank"] == 32


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.yaml", "a: [1", "neither YAML nor JSON"),
        ("a.yaml", "", "expected keys with values"),
        ("a.yaml", "learning_rate: 1\n", "can't tell which program"),
        ("a.sh", "python other.py --x 1\n", "no command line of a program"),
        ("a.json", "[1]", "expected keys with values"),
    ],
)
def test_what_is_no_config_is_refused(name: str, text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=words):
        read_foreign(tmp_path / name)


def test_a_name_that_is_not_there_finds_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text("a: 1")
    with pytest.raises(ConfigError, match=r"train\.yaml"):
        read_foreign(tmp_path / "trian.yaml")


def test_parts_of_a_fused_layer_are_read_as_peft_had_them(tmp_path: Path) -> None:
    """As PEFT wrote BLOOM's in 2023."""
    said = {"peft_type": "LORA", "r": 8, "target_modules": ["query_key_value"], "enable_lora": [True, False, True],
            "base_model_name_or_path": "org/bloom"}  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps(said))
    found = read_foreign(tmp_path / "adapter_config.json")
    assert read(found.program, found.said, devices=1).settings["slices"] == ["query_key_value=1/3,3/3"]
    for other in ({"target_modules": None}, {"enable_lora": [False, False]}):
        (line,) = [x for x in read(found.program, said | other, devices=1).lines if x.theirs == "enable_lora"]
        assert line.kind == "not taken"
    spelled = read(found.program, said | {"enable_lora": ["True", "False"]}, devices=1)
    assert spelled.settings["slices"] == ["query_key_value=1/2"]


def test_a_folder_is_no_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is a folder\n  expected +one file"):
        read_foreign(tmp_path)


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_rule_names_settings_that_we_have(name: str) -> None:
    """Each rule is asked about a few values; what it answers must be fields of ours."""
    fields = {*SFTConfig.model_fields, "command"}
    for key, rule in PROGRAMS[name].rules.items():
        for value in (True, 1, "lora", "x,y", ["a"]):
            said = read(PROGRAMS[name], {key: value}, devices=1).settings
            assert set(said) <= fields, (key, rule)


def test_a_number_that_is_a_text_there_is_the_same_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.sh").write_text(SWIFT, encoding="utf-8")
    kinds = {line["theirs"]: line["kind"] for line in imported(capsys, str(tmp_path / "run.sh"))["lines"]}
    assert {kinds[name] for name in ("learning_rate", "lora_rank", "target_modules", "save_total_limit")} == {"taken"}
    assert {kinds[name] for name in ("dataset", "gradient_accumulation_steps", "use_dora")} == {"changed"}
