"""Arguments of TRL's SFT script and of PEFT's ``LoraConfig``: https://huggingface.co/docs/trl/sft_trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from truetune.config.imports.rules import Meaning, Program, Rule, is_off, is_on, lost, nothing, on, targets, to
from truetune.config.imports.transformers_keys import COMMON, DEFAULTS
from truetune.config.lora import enabled_slices


def _dataset(value: Any, said: Mapping[str, Any]) -> Meaning:
    local = "." in str(value).rpartition("/")[2] or str(value).startswith((".", "/", "~"))
    split = said.get("dataset_train_split")
    return Meaning({"data": [str(value) if local else f"hub:{value}" + (f":{split}" if split else "")]})


def _peft(value: Any, said: Mapping[str, Any]) -> Meaning:
    return Meaning({"method": "lora"}) if is_on(value) else Meaning({"method": "full"})


def _type(value: Any, said: Mapping[str, Any]) -> Meaning:
    found = {"LORA": "lora", "ADALORA": "adalora", "IA3": "ia3", "VERA": "vera", "PREFIX_TUNING": "prefix",
             "PROMPT_TUNING": "prompt", "P_TUNING": "ptuning"}.get(str(value).rpartition(".")[2].upper())  # fmt: skip
    return Meaning({"method": found}) if found else Meaning({}, "see truetune inspect --methods")


def _quant(kind: str) -> Rule:
    def rule(value: Any, said: Mapping[str, Any]) -> Meaning:
        if not is_on(value):
            return Meaning({}, "off", harmless=True)
        four = str(said.get("bnb_4bit_quant_type", "nf4"))
        return Meaning({"quant": four if kind == "4" else "int8"})

    return rule


def _init(value: Any, said: Mapping[str, Any]) -> Meaning:
    if value is True or str(value).lower() in ("true", "kaiming"):
        return Meaning({"init": "kaiming"})
    known = {"gaussian", "orthogonal", "pissa", "loftq"}
    found = str(value).partition("_niter")[0].lower()
    return Meaning({"init": found}) if found in known else Meaning({}, "see --init")


def _bias(value: Any, said: Mapping[str, Any]) -> Meaning:
    if value == "all":
        return Meaning({"trainable": ["bias"]})
    return Meaning({}, "off" if is_off(value) else "all biases or none: --trainable bias", is_off(value))


def _enabled(value: Any, said: Mapping[str, Any]) -> Meaning:
    enabled = [is_on(part) for part in value] if isinstance(value, list) else []
    if not enabled or all(enabled):
        return Meaning({}, "all parts", harmless=True)
    slices = enabled_slices(enabled, targets(said.get("target_modules") or ())) if any(enabled) else ()
    return Meaning({"slices": list(slices)}) if slices else Meaning({}, "of which layers? --slices LAYER=1/3,3/3")


def _pattern(name: str) -> Rule:
    return lambda value, said: (
        Meaning({name: [f"{key}={number}" for key, number in value.items()]}) if value else Meaning({}, "none", True)
    )


def _only(value: Any, said: Mapping[str, Any]) -> Meaning:
    return Meaning({"train_on": "assistant"}) if is_on(value) else Meaning({"train_on": "all"})


_OFF = lost("not in this program: see truetune inspect --methods")
_LENGTH = to("max_length", int, "longer rows are left out or named, not cut: --on-overlong truncate cuts")
RULES: dict[str, Rule] = {
    **COMMON,
    "model_name_or_path": to("model"),
    "base_model_name_or_path": to("model"),
    "model_revision": to("revision"),
    "revision": to("revision"),
    "torch_dtype": to("dtype"),
    "dtype": to("dtype"),
    "dataset_name": _dataset,
    "dataset_train_split": nothing("see data"),
    "dataset_test_split": nothing("--val-data"),
    "dataset_text_field": lambda value, said: (
        Meaning({}, "told from the columns", True) if value == "text" else Meaning({"columns": [f"text={value}"]})
    ),
    "dataset_config": lost("a folder of the data set: hub:ORG/NAME/FOLDER"),
    "dataset_streaming": nothing("data larger than memory is read in pieces anyway"),
    "max_length": _LENGTH,
    "max_seq_length": _LENGTH,
    "packing": nothing("rows are packed where the model keeps them apart exactly"),
    "padding_free": nothing("always"),
    "assistant_only_loss": _only,
    "completion_only_loss": nothing("only completions carry a loss; see train_on"),
    "eos_token": lost("the template's own end of a turn"),
    "chat_template_path": to("template"),
    "use_liger_kernel": nothing("speed only"),
    "use_peft": _peft,
    "peft_type": _type,
    "task_type": nothing("always CAUSAL_LM"),
    "r": to("rank", int),
    "lora_r": to("rank", int),
    "lora_alpha": to("alpha", float),
    "lora_dropout": to("dropout", float),
    "target_modules": to("targets", targets),
    "lora_target_modules": to("targets", targets),
    "exclude_modules": to("exclude", targets),
    "layers_to_transform": lambda value, said: Meaning({"layers": value if isinstance(value, list) else [value]}),
    "layers_pattern": nothing("the decoder's layers"),
    "rank_pattern": _pattern("rank_pattern"),
    "alpha_pattern": _pattern("alpha_pattern"),
    "enable_lora": _enabled,
    "merge_weights": nothing("only while answering"),
    "modules_to_save": lost("parts of the base to train in full: --trainable embedding head norm"),
    "lora_modules_to_save": lost("parts of the base to train in full: --trainable embedding head norm"),
    "trainable_token_indices": lambda value, said: Meaning({"token_rows": value}),
    "bias": _bias,
    "use_rslora": on({"use_rslora": True}),
    "use_dora": on({"method": "dora"}),
    "lora_bias": on({"lora_bias": True}),
    "init_lora_weights": _init,
    "fan_in_fan_out": nothing("told from the layer"),
    "inference_mode": nothing("of a file"),
    "auto_mapping": nothing("of a file"),
    "peft_version": nothing("of a file"),
    "load_in_4bit": _quant("4"),
    "load_in_8bit": _quant("8"),
    "bnb_4bit_quant_type": nothing("see quant"),
    "use_bnb_nested_quant": on({"double_quant": True}),
    "bnb_4bit_use_double_quant": on({"double_quant": True}),
    "bnb_4bit_compute_dtype": nothing("see dtype"),
    **dict.fromkeys(
        ("target_parameters", "layer_replication", "loftq_config", "eva_config", "corda_config", "use_qalora",
         "use_bdlora", "alora_invocation_tokens", "arrow_config", "lora_ga_config", "kasa_config", "velora_config",
         "monteclora_config", "megatron_config", "megatron_core", "ensure_weight_tying", "qalora_group_size"), _OFF,
    ),
}  # fmt: skip


def _defaults(said: Mapping[str, Any]) -> Mapping[str, Any]:
    if "r" in said or "peft_type" in said:  # PEFT's own file says nothing of a run
        return {"rank": 8, "alpha": 8.0} if said.get("peft_type", "LORA") == "LORA" else {}
    own: dict[str, Any] = {**DEFAULTS, "lr": 2e-5, "max_length": 1024}
    return own | ({"rank": 16, "alpha": 32.0, "dropout": 0.05} if is_on(said.get("use_peft")) else {"method": "full"})


PROGRAM = Program(
    "PEFT and TRL",
    frozenset({"use_peft", "lora_r", "lora_target_modules", "dataset_name", "peft_type", "r", "max_seq_length",
               "assistant_only_loss"}),
    RULES,
    _defaults,
    ("per_device_train_batch_size", "gradient_accumulation_steps"),
)  # fmt: skip
