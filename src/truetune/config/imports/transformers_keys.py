"""Keys of transformers' ``TrainingArguments``, which most programs pass on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from truetune.config.imports.rules import (
    SCHEDULE,
    Meaning,
    Rule,
    half,
    is_off,
    is_on,
    lost,
    nothing,
    optimizer,
    to,
    warmup_ratio,
    warmup_steps,
)


def _checkpointing(value: Any, said: Mapping[str, Any]) -> Meaning:
    if not is_on(value):
        return Meaning({}, "off; ours is used only where memory asks for it", harmless=True)
    return Meaning({}, "decided here by what fits: the result is the same; --recompute full forces it", harmless=True)


def _max_steps(value: Any, said: Mapping[str, Any]) -> Meaning:
    return Meaning({"max_steps": int(value)}) if int(value) > 0 else Meaning({}, "epochs count", harmless=True)


def every(name: str, strategy: str) -> Rule:
    """Steps between two events; a share of all steps is not a number of them."""

    def rule(value: Any, said: Mapping[str, Any]) -> Meaning:
        if said.get(strategy) in ("no", "epoch", False):
            return Meaning({}, f"{strategy} is {said[strategy]}", harmless=True)
        if float(value) < 1:
            return Meaning({}, f"a share of all steps; --{name.replace('_', '-')} takes their number", harmless=True)
        return Meaning({name: int(float(value))})

    return rule


def _resume(value: Any, said: Mapping[str, Any]) -> Meaning:
    return Meaning({}, "off" if is_off(value) else "another program's checkpoint can't be resumed", is_off(value))


def _best(value: Any, said: Mapping[str, Any]) -> Meaning:
    return Meaning({"select": "best"}) if is_on(value) else Meaning({}, "off", harmless=True)


_SPEED = nothing("speed or memory only; decided here by what the machine has")
_TRACK = nothing("runs are logged to log.jsonl")
COMMON: Mapping[str, Rule] = {
    "output_dir": to("out"),
    "learning_rate": to("lr", float),
    "num_train_epochs": to("epochs", float),
    "max_steps": _max_steps,
    "lr_scheduler_type": SCHEDULE,
    "warmup_ratio": warmup_ratio,
    "warmup_steps": warmup_steps,
    "weight_decay": to("weight_decay", float),
    "max_grad_norm": to("clip", float),
    "optim": optimizer,
    "seed": to("seed", int),
    "data_seed": nothing("the order of the rows follows from --seed"),
    "adam_beta1": lost("the first moment's rate is 0.9"),
    "adam_beta2": lost("the second moment's rate is 0.999"),
    "adam_epsilon": lost("epsilon is 1e-8"),
    "bf16": half("bfloat16"),
    "fp16": half("float16"),
    "tf32": _SPEED,
    "gradient_checkpointing": _checkpointing,
    "gradient_checkpointing_kwargs": _SPEED,
    "neftune_noise_alpha": to("neftune_alpha", float),
    "label_smoothing_factor": to("label_smoothing", float),
    "save_steps": every("save_every", "save_strategy"),
    "save_strategy": nothing("see save_every"),
    "save_total_limit": to("keep", int),
    "save_only_model": nothing("checkpoints are always whole, so that a run can be resumed"),
    "save_safetensors": nothing("always"),
    "eval_steps": every("eval_every", "eval_strategy"),
    "eval_strategy": nothing("see eval_every"),
    "evaluation_strategy": nothing("see eval_every"),
    "load_best_model_at_end": _best,
    "metric_for_best_model": nothing("the held-out loss"),
    "logging_steps": every("log_every", "logging_strategy"),
    "logging_strategy": nothing("see log_every"),
    "logging_dir": _TRACK,
    "report_to": _TRACK,
    "run_name": _TRACK,
    "resume_from_checkpoint": _resume,
    "overwrite_output_dir": nothing("a run never overwrites another: --out with a new folder"),
    "do_train": nothing("always"),
    "do_eval": nothing("where rows are held out"),
    "per_device_eval_batch_size": nothing("the held-out loss does not depend on it"),
    "dataloader_num_workers": _SPEED,
    "dataloader_pin_memory": _SPEED,
    "preprocessing_num_workers": _SPEED,
    "dataset_num_proc": _SPEED,
    "ddp_timeout": _SPEED,
    "ddp_find_unused_parameters": _SPEED,
    "deepspeed": nothing("another way to share memory between devices; the result is the same"),
    "fsdp": nothing("another way to share memory between devices; the result is the same"),
    "fsdp_config": _SPEED,
    "torch_compile": _SPEED,
    "group_by_length": nothing("packing makes it needless"),
    "remove_unused_columns": nothing("columns are told by their names"),
    "push_to_hub": nothing("truetune export --push, when the run is done"),
    "hub_model_id": nothing("truetune export --push, when the run is done"),
    "trust_remote_code": lost("code of a model's folder is never run"),
    "attn_implementation": _SPEED,
    "flash_attn": _SPEED,
    "low_cpu_mem_usage": _SPEED,
    "disable_tqdm": _TRACK,
    "include_num_input_tokens_seen": _TRACK,
    "plot_loss": nothing("always, where matplotlib is installed"),
    "label_names": nothing("told from the rows"),
}
DEFAULTS: Mapping[str, Any] = {"lr": 5e-5, "schedule": "linear", "warmup": 0.0, "epochs": 3.0, "seed": 42}
"""transformers' own, where they are not ours."""
