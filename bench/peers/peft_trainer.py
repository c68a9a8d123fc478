"""PEFT and transformers' Trainer, as their documentation puts them together. Runs in the peer's own environment.

    python peft_trainer.py TASK.json

The rows come tokenised, which spares this side the tokenising that ours does at its start. Where the task's setting
has ``quant``, the base is quantised by bitsandbytes, in PEFT's recipe for that.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)


class StepLog(TrainerCallback):
    """A line per step: when it ended, and its loss."""

    def __init__(self, path: str) -> None:
        self._file = Path(path).open("a", encoding="utf-8", buffering=1)  # noqa: SIM115
        self._end = 0.0

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._end = time.time()

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        if "loss" in logs:  # the summary at the end has none
            self._file.write(json.dumps({"end": self._end, "loss": float(logs["loss"])}) + "\n")


def load(path: str, setting: dict[str, Any]) -> Any:
    """The base, dense, or in NF4 with double quantised scales."""
    dtype = getattr(torch, setting["dtype"])
    if setting.get("quant", "none") == "none":
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    quantised = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=setting["quant"], bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, quantization_config=quantised)
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=setting["checkpointing"])


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    setting = task["setting"]
    tokenizer = AutoTokenizer.from_pretrained(task["model"])
    model = load(task["model"], setting)
    torch.manual_seed(0)
    lora = LoraConfig(
        r=setting["rank"], lora_alpha=2 * setting["rank"], lora_dropout=setting["dropout"],
        target_modules="all-linear", task_type="CAUSAL_LM",
    )  # fmt: skip
    arguments = TrainingArguments(
        task["out"], per_device_train_batch_size=setting["batch_size"], max_steps=task["steps"],
        learning_rate=setting["lr"], lr_scheduler_type="cosine", warmup_steps=0, save_strategy="no", logging_steps=1,
        report_to=[], bf16=False, use_cpu=True, disable_tqdm=True, train_sampling_strategy="sequential",
    )  # fmt: skip
    lines = (Path(task["rows"]) / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    Trainer(
        model=get_peft_model(model, lora), args=arguments,
        train_dataset=[row | {"attention_mask": [1] * len(row["input_ids"])} for row in rows],
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True), callbacks=[StepLog(task["log"])],
    ).train()  # fmt: skip


if __name__ == "__main__":
    main()
