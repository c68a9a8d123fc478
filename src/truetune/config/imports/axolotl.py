"""axolotl's YAML: https://docs.axolotl.ai/docs/config-reference.html."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from truetune.config.imports.llamafactory import TEMPLATES
from truetune.config.imports.rules import (
    SCHEDULE,
    Meaning,
    Program,
    Rule,
    is_on,
    lost,
    nothing,
    on,
    optimizer,
    targets,
    to,
)  # fmt: skip
from truetune.config.imports.transformers_keys import COMMON

_FORMATS = {"alpaca": "alpaca", "sharegpt": "sharegpt", "chat_template": "messages", "completion": "text"}


def _datasets(value: Any, said: Mapping[str, Any]) -> Meaning:
    """A list of data sets, each with a path, a type, and what else."""
    found, formats, notes = [], set(), []
    for item in value:
        item = {"path": item} if isinstance(item, str) else dict(item)
        path, split = str(item.pop("path")), item.pop("split", None)
        files = item.pop("data_files", None)
        local = "." in path.rpartition("/")[2] or path.startswith((".", "/", "~"))
        found += [files] if isinstance(files, str) else list(files or []) or [
            path if local else f"hub:{path}" + (f":{split}" if split else "")
        ]  # fmt: skip
        formats.add(_FORMATS.get(str(item.pop("type", "")), "auto"))
        item.pop("ds_type", None)
        if item:
            notes.append(f"{path}: {', '.join(item)} not taken; --columns says which column is which")
    form = formats.pop() if len(formats) == 1 else "auto"
    settings = {"data": found} | ({"format": form} if form != "auto" else {})
    if form == "alpaca" and not said.get("chat_template"):  # there a type words its prompts, too
        settings["template"] = "alpaca"
    return Meaning(settings, "; ".join(notes))


def _tests(value: Any, said: Mapping[str, Any]) -> Meaning:
    return Meaning({"val_data": _datasets(value, said).settings["data"]})


def _adapter(value: Any, said: Mapping[str, Any]) -> Meaning:
    found: dict[str, dict[str, Any]] = {"lora": {"method": "lora"}, "qlora": {"method": "lora", "quant": "nf4"}}
    kind = str(value).lower()
    return Meaning(found[kind]) if kind in found else Meaning({}, "see truetune inspect --methods")


def _template(value: Any, said: Mapping[str, Any]) -> Meaning:
    kind = str(value).lower()
    if kind == "tokenizer_default":
        return Meaning({"template": "auto"})
    known = TEMPLATES.get({"phi_3": "phi3", "mistral_v1": "mistral"}.get(kind, kind))
    note = "" if known else "none of that name here: the tokenizer's own; see truetune preview"
    return Meaning({"template": known or "auto"}, note)


def _quant(kind: str) -> Rule:
    def rule(value: Any, said: Mapping[str, Any]) -> Meaning:
        return Meaning({"quant": kind}) if is_on(value) else Meaning({}, "off", harmless=True)

    return rule


def _val(value: Any, said: Mapping[str, Any]) -> Meaning:
    share = float(value)
    return Meaning({"val_split": share}) if share < 1 else Meaning({}, "a number of rows; --val-split takes a share")


def _inputs(value: Any, said: Mapping[str, Any]) -> Meaning:
    return Meaning({"train_on": "all"}) if is_on(value) else Meaning({"train_on": "assistant"})


def _per_epoch(value: Any, said: Mapping[str, Any]) -> Meaning:
    return Meaning({}, "a number per epoch; --save-every and --eval-every count steps", harmless=True)


_NOT_NEEDED = nothing("speed or memory only; decided here by what the machine has")
RULES: dict[str, Rule] = {
    **COMMON,
    "base_model": to("model"),
    "base_model_config": nothing("the model's own"),
    "revision_of_model": to("revision"),
    "model_type": nothing("told from the model's config"),
    "tokenizer_type": nothing("told from the model's files"),
    "tokenizer_config": lost("the tokenizer is the model's own"),
    "adapter": _adapter,
    "lora_model_dir": to("adapter"),
    "load_in_4bit": _quant("nf4"),
    "load_in_8bit": _quant("int8"),
    "bnb_config_kwargs": lost("--double-quant, --quant fp4"),
    "lora_r": to("rank", int),
    "lora_alpha": to("alpha", float),
    "lora_dropout": to("dropout", float),
    "lora_target_modules": to("targets", targets),
    "lora_target_linear": on({"targets": ["all-linear"]}),
    "lora_modules_to_save": lost("parts of the base to train in full: --trainable embedding head norm"),
    "lora_fan_in_fan_out": nothing("told from the layer"),
    "peft_use_dora": on({"method": "dora"}),
    "peft_use_rslora": on({"use_rslora": True}),
    "loraplus_lr_ratio": to("lora_plus_ratio", float),
    "datasets": _datasets,
    "test_datasets": _tests,
    "pretraining_dataset": lambda value, said: Meaning(
        {"command": "pretrain", **_datasets(value if isinstance(value, list) else [value], said).settings}
    ),
    "dataset_prepared_path": nothing("what is cached is found by its content"),
    "shuffle_merged_datasets": nothing("always"),
    "chat_template": _template,
    "sequence_len": to("max_length", int),
    "sample_packing": nothing("rows are packed where the model keeps them apart exactly"),
    "eval_sample_packing": nothing("rows are packed where the model keeps them apart exactly"),
    "pad_to_sequence_len": nothing("nothing is padded"),
    "train_on_inputs": _inputs,
    "val_set_size": _val,
    "num_epochs": to("epochs", float),
    "lr_scheduler": SCHEDULE,
    "optimizer": optimizer,
    "cosine_min_lr_ratio": lost("the schedule ends at zero"),
    "saves_per_epoch": _per_epoch,
    "evals_per_epoch": _per_epoch,
    "eval_table_size": nothing("truetune eval"),
    "special_tokens": lost("the tokenizer's own; new ones by --new-tokens"),
    "tokens": lambda value, said: Meaning({"new_tokens": list(value)}),
    "strict": nothing("unknown keys are always refused"),
    "flash_attention": _NOT_NEEDED,
    "sdp_attention": _NOT_NEEDED,
    "xformers_attention": _NOT_NEEDED,
    "eager_attention": _NOT_NEEDED,
    "plugins": _NOT_NEEDED,
    "liger_rope": _NOT_NEEDED,
    "liger_rms_norm": _NOT_NEEDED,
    "liger_glu_activation": _NOT_NEEDED,
    "liger_fused_linear_cross_entropy": _NOT_NEEDED,
    "lora_mlp_kernel": _NOT_NEEDED,
    "lora_qkv_kernel": _NOT_NEEDED,
    "lora_o_kernel": _NOT_NEEDED,
    "wandb_project": nothing("runs are logged to log.jsonl"),
    "wandb_entity": nothing("runs are logged to log.jsonl"),
    "wandb_watch": nothing("runs are logged to log.jsonl"),
    "wandb_name": nothing("runs are logged to log.jsonl"),
    "wandb_log_model": nothing("runs are logged to log.jsonl"),
    "early_stopping_patience": lost("a run goes to its end; --select best keeps the best state"),
    "loss_watchdog_threshold": nothing("a loss that is no number stops a run"),
}


def _defaults(said: Mapping[str, Any]) -> Mapping[str, Any]:
    own: dict[str, Any] = {"epochs": 1.0, "schedule": "cosine", "seed": 42}
    return own if said.get("adapter") else {**own, "method": "full"}


PROGRAM = Program(
    "axolotl",
    frozenset({"sequence_len", "micro_batch_size", "datasets", "lora_target_linear", "sample_packing", "num_epochs"}),
    RULES,
    _defaults,
    ("micro_batch_size", "gradient_accumulation_steps"),
    (1, 1),
)
