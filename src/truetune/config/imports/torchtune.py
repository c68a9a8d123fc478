"""torchtune's YAML, its nested keys joined by dots: https://meta-pytorch.org/torchtune/main/deep_dives/configs.html."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from truetune.config.imports.rules import Meaning, Program, Rule, is_off, lost, nothing, on, optimizer, to

_PROJECTIONS = {"output_proj": "o_proj"}


def _component(value: Any, said: Mapping[str, Any]) -> Meaning:
    """``torchtune.models.llama3_1.qlora_llama3_1_8b``: the weights are elsewhere; its name says the method."""
    name = str(value).rpartition(".")[2]
    if name.startswith("qlora"):
        return Meaning({"method": "lora", "quant": "nf4"}, "the weights are those of checkpointer.checkpoint_dir")
    method = "lora" if name.startswith("lora") else "dora" if name.startswith("dora") else "full"
    return Meaning({"method": method}, "the weights are those of checkpointer.checkpoint_dir")


def _attention(value: Any, said: Mapping[str, Any]) -> Meaning:
    """The layers that get an adapter; those of the MLP and the head are told by two more keys."""
    layers = [_PROJECTIONS.get(str(name), str(name)) for name in value]
    if said.get("model.apply_lora_to_mlp"):
        layers += ["gate_proj", "up_proj", "down_proj"]
    if said.get("model.apply_lora_to_output"):
        layers.append("lm_head")
    return Meaning({"targets": layers}, "by transformers' names")


def _alone(value: Any, said: Mapping[str, Any]) -> Meaning:
    taken = "model.lora_attn_modules" in said
    return Meaning({}, "in targets" if taken else "without lora_attn_modules: see --targets", taken or is_off(value))


def _data(value: Any, said: Mapping[str, Any]) -> Meaning:
    files = said.get("dataset.data_files")
    if files:
        return Meaning({"data": [files] if isinstance(files, str) else list(files)})
    split = said.get("dataset.split")
    return Meaning({"data": [f"hub:{value}" + (f":{split}" if split and re.fullmatch(r"\w+", str(split)) else "")]})


_DATASETS = {"alpaca_dataset": "tatsu-lab/alpaca", "alpaca_cleaned_dataset": "yahma/alpaca-cleaned"}


def _dataset(value: Any, said: Mapping[str, Any]) -> Meaning:
    name = str(value).rpartition(".")[2]
    if "dataset.source" in said:
        return Meaning({}, "its rows are those of dataset.source", harmless=True)
    if name in _DATASETS:
        return Meaning({"data": [f"hub:{_DATASETS[name]}"], "format": "alpaca", "template": "alpaca"})
    return Meaning({}, "a data set by its class: give --data")


def _schedule(value: Any, said: Mapping[str, Any]) -> Meaning:
    name = str(value).rpartition(".")[2]
    found = next((kind for kind in ("cosine", "linear", "constant") if kind in name), None)
    return Meaning({"schedule": found}) if found else Meaning({}, "known are cosine, linear, constant")


def _optimizer(value: Any, said: Mapping[str, Any]) -> Meaning:
    return optimizer(re.sub(r"^Paged", "paged_", str(value).rpartition(".")[2]), said)


def _dtype(value: Any, said: Mapping[str, Any]) -> Meaning:
    found = {"bf16": "bfloat16", "fp32": "float32", "fp16": "float16"}.get(str(value))
    return Meaning({"dtype": found}) if found else Meaning({}, "known are bf16, fp16 and fp32")


def _out(value: Any, said: Mapping[str, Any]) -> Meaning:
    return Meaning({"out": str(value)})


_FOLDER = nothing("the model's folder has all files")
_SPEED = nothing("speed or memory only; decided here by what the machine has")
_LOG = nothing("runs are logged to log.jsonl")
RULES: dict[str, Rule] = {
    "output_dir": _out,
    "model._component_": _component,
    "model.lora_attn_modules": _attention,
    "model.apply_lora_to_mlp": _alone,
    "model.apply_lora_to_output": _alone,
    "model.lora_rank": to("rank", int),
    "model.lora_alpha": to("alpha", float),
    "model.lora_dropout": to("dropout", float),
    "model.use_dora": on({"method": "dora"}),
    "model.quantize_base": on({"quant": "nf4"}, "bitsandbytes' NF4, which rounds a little otherwise"),
    "tokenizer._component_": nothing("the model's own"),
    "tokenizer.path": _FOLDER,
    "tokenizer.merges_file": _FOLDER,
    "tokenizer.max_seq_len": to("max_length", int),
    "tokenizer.prompt_template": lost("the tokenizer's own template is taken; see --template"),
    "checkpointer._component_": nothing("safetensors are read"),
    "checkpointer.checkpoint_dir": to("model"),
    "checkpointer.checkpoint_files": _FOLDER,
    "checkpointer.output_dir": nothing("see out"),
    "checkpointer.model_type": nothing("told from the model's config"),
    "checkpointer.recipe_checkpoint": nothing("another program's checkpoint can't be resumed"),
    "checkpointer.safe_serialization": nothing("always"),
    "resume_from_checkpoint": lost("another program's checkpoint can't be resumed"),
    "save_adapter_weights_only": nothing("adapters are always saved alone"),
    "dataset._component_": _dataset,
    "dataset.source": _data,
    "dataset.data_files": nothing("see data"),
    "dataset.split": nothing("see data"),
    "dataset.packed": nothing("rows are packed where the model keeps them apart exactly"),
    "dataset.train_on_input": on({"train_on": "all"}),
    "dataset.column_map": lost("--columns says which column is which"),
    "dataset.conversation_column": lost("--columns says which column is which"),
    "dataset.conversation_style": nothing("told from the rows"),
    "seed": to("seed", int),
    "shuffle": nothing("always"),
    "epochs": to("epochs", float),
    "max_steps_per_epoch": lambda value, said: Meaning(
        {"max_steps": int(value) * int(said.get("epochs") or 1)}, "per epoch × epochs"
    ),
    "optimizer._component_": _optimizer,
    "optimizer.lr": to("lr", float),
    "optimizer.weight_decay": to("weight_decay", float),
    "optimizer.fused": _SPEED,
    "lr_scheduler._component_": _schedule,
    "lr_scheduler.num_warmup_steps": to("warmup", float),
    "loss._component_": nothing("cross-entropy over the trained tokens"),
    "clip_grad_norm": to("clip", float),
    "compile": _SPEED,
    "device": to("device"),
    "dtype": _dtype,
    "enable_activation_checkpointing": _SPEED,
    "enable_activation_offloading": _SPEED,
    "custom_sharded_layers": _SPEED,
    "fsdp_cpu_offload": _SPEED,
    "cudnn_deterministic_mode": _SPEED,
    "log_every_n_steps": to("log_every", int),
    "log_peak_memory_stats": nothing("always"),
    "log_level": _LOG,
    "metric_logger._component_": _LOG,
    "metric_logger.log_dir": _LOG,
    "metric_logger.project": _LOG,
    "profiler._component_": _LOG,
    "profiler.enabled": _LOG,
    "profiler.output_dir": _LOG,
}


def flat(nested: Mapping[str, Any], lead: str = "") -> dict[str, Any]:
    """``{"model": {"lora_rank": 8}}`` as ``{"model.lora_rank": 8}``."""
    found: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping) and key != "column_map":
            found |= flat(value, f"{lead}{key}.")
        else:
            found[lead + key] = value
    return found


def _defaults(said: Mapping[str, Any]) -> Mapping[str, Any]:
    """What its recipes do where a config is silent: the rate stays as it is, and nothing is clipped."""
    has_schedule = "lr_scheduler._component_" in said
    own: dict[str, Any] = {} if has_schedule else {"schedule": "constant", "warmup": 0.0}
    return {**own, "clip": 0.0, "epochs": 1.0}


PROGRAM = Program(
    "torchtune",
    frozenset({"checkpointer.checkpoint_dir", "model._component_", "dataset._component_", "optimizer._component_"}),
    RULES,
    _defaults,
    ("batch_size", "gradient_accumulation_steps"),
    (1, 1),
)
