"""LLaMA-Factory's YAML: https://github.com/hiyouga/LLaMA-Factory/tree/main/examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from truetune.config.imports.rules import Meaning, Program, bits, chosen, lost, names, nothing, on, targets, to
from truetune.config.imports.transformers_keys import COMMON, DEFAULTS

TEMPLATES = {
    "alpaca": "alpaca", "chatml": "chatml", "deepseek": "deepseek", "deepseek3": "deepseek", "gemma": "gemma",
    "llama2": "llama2", "llama3": "llama3", "mistral": "mistral", "phi": "phi3", "phi3": "phi3", "qwen": "qwen",
    "vicuna": "vicuna", "zephyr": "zephyr",
}  # fmt: skip


def template(value: Any, said: Mapping[str, Any]) -> Meaning:
    """Ours of the same name; else the tokenizer's own, which such names stand for."""
    if (found := TEMPLATES.get(str(value).lower())) is not None:
        return Meaning({"template": found})
    return Meaning({"template": "auto"}, "none of that name here: the tokenizer's own; see truetune preview")


def _stage(value: Any, said: Mapping[str, Any]) -> Meaning:
    found = {"sft": "sft", "pt": "pretrain"}.get(str(value))
    return Meaning({"command": found}) if found else Meaning({}, "preference training is not in this program")


def data_names(value: Any, said: Mapping[str, Any]) -> Meaning:
    """Names of ``dataset_info.json``; a path or a Hub name says where it is."""
    found = names(value)
    bare = [name for name in found if "/" not in name and "." not in name]
    note = f"{', '.join(bare)}: names of its dataset_info.json; write their files instead" if bare else ""
    return Meaning({"data": found}, note)


def _alpha(said: Mapping[str, Any]) -> float:
    rank = str(said.get("lora_rank") or 8)
    return 2.0 * int(rank) if rank.isdigit() else 16.0


def _defaults(said: Mapping[str, Any]) -> Mapping[str, Any]:
    own: dict[str, Any] = {**DEFAULTS, "max_length": 2048}
    if said.get("finetuning_type", "lora") == "lora":
        own |= {"rank": 8, "alpha": _alpha(said)}
    return own


_METHODS = {"lora": "lora", "full": "full", "freeze": "freeze"}
RULES = {
    **COMMON,
    "model_name_or_path": to("model"),
    "model_revision": to("revision"),
    "adapter_name_or_path": to("adapter"),
    "stage": _stage,
    "finetuning_type": chosen("method", _METHODS, "known here by another name, or not at all: see inspect --methods"),
    "lora_rank": to("rank", int),
    "lora_alpha": to("alpha", float),
    "lora_dropout": to("dropout", float),
    "lora_target": to("targets", targets),
    "use_rslora": on({"use_rslora": True}),
    "use_dora": on({"method": "dora"}),
    "pissa_init": on({"init": "pissa"}),
    "pissa_iter": nothing("the singular values are exact here"),
    "loraplus_lr_ratio": to("lora_plus_ratio", float),
    "additional_target": lost("parts of the base to train in full: --trainable embedding head norm"),
    "freeze_trainable_layers": lost("see the settings of --method freeze"),
    "quantization_bit": bits,
    "quantization_type": nothing("see quant"),
    "quantization_method": lost("bases are packed in bitsandbytes' formats"),
    "double_quantization": on({"double_quant": True}),
    "dataset": data_names,
    "eval_dataset": lambda value, said: Meaning({"val_data": names(value)}),
    "dataset_dir": nothing("paths are written with the data"),
    "template": template,
    "cutoff_len": to("max_length", int, "longer rows are left out or named, not cut: --on-overlong truncate cuts"),
    "max_samples": lost("--data FILE=0.1 takes one row in ten"),
    "val_size": lambda value, said: (
        Meaning({"val_split": float(value)}) if float(value) < 1 else Meaning({}, "a number of rows; a share is taken")
    ),
    "packing": lambda value, said: Meaning({}, "rows are packed where the model keeps them apart exactly", True),
    "neat_packing": nothing("always"),
    "train_on_prompt": on({"train_on": "all"}),
    "mask_history": on({"train_on": "last"}),
    "default_system": to("system"),
    "overwrite_cache": nothing("what is cached is found by its content"),
    "enable_liger_kernel": nothing("speed only"),
    "use_unsloth": nothing("speed only"),
    "upcast_layernorm": nothing("norms are computed in float32"),
    "pure_bf16": on({"dtype": "bfloat16"}),
    "resize_vocab": nothing("--new-tokens makes the table larger"),
    "new_special_tokens": lambda value, said: Meaning({"new_tokens": names(value)}),
}
PROGRAM = Program(
    "LLaMA-Factory",
    frozenset({"stage", "finetuning_type", "cutoff_len", "lora_target", "dataset_dir", "quantization_bit"}),
    RULES,
    _defaults,
    ("per_device_train_batch_size", "gradient_accumulation_steps"),
)
