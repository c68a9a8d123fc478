"""ms-swift's command lines: https://swift.readthedocs.io/en/latest/Instruction/Command-line-parameters.html."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from truetune.config.imports.llamafactory import template
from truetune.config.imports.rules import Meaning, Program, Rule, bits, chosen, lost, nothing, on, targets, to
from truetune.config.imports.transformers_keys import COMMON, DEFAULTS

_METHODS = {"lora": "lora", "full": "full", "adalora": "adalora", "ia3": "ia3", "vera": "vera"}


def _dataset(value: Any, said: Mapping[str, Any]) -> Meaning:
    """``PATH#1000`` takes so many rows; ``ORG/NAME`` is of a hub."""
    found, notes = [], []
    for item in value if isinstance(value, list) else str(value).split():
        path, _, count = str(item).partition("#")
        if count:
            notes.append(f"{path}: all rows, not {count}; {path}=0.1 takes one in ten")
        local = "." in path.rpartition("/")[2] or path.startswith((".", "/", "~"))
        found.append(path if local else f"hub:{path}")
    return Meaning({"data": found}, "; ".join(notes))


def _dtype(value: Any, said: Mapping[str, Any]) -> Meaning:
    known = ("float32", "bfloat16", "float16", "auto")
    return Meaning({"dtype": str(value)}) if str(value) in known else Meaning({}, f"known are {', '.join(known)}")


def _max_length(value: Any, said: Mapping[str, Any]) -> Meaning:
    return Meaning({"max_length": int(value)}, "longer rows are left out or named; --on-overlong truncate cuts")


_WHAT = chosen("method", _METHODS, "not a method here: see truetune inspect --methods")
RULES: dict[str, Rule] = {
    **COMMON,
    "command": lambda value, said: Meaning({"command": {"pt": "pretrain"}.get(value, "sft")}),
    "model": to("model"),
    "model_type": nothing("told from the model's config"),
    "model_id_or_path": to("model"),
    "tuner_type": _WHAT,
    "train_type": _WHAT,
    "sft_type": _WHAT,
    "dataset": _dataset,
    "val_dataset": lambda value, said: Meaning({"val_data": _dataset(value, said).settings["data"]}),
    "split_dataset_ratio": to("val_split", float),
    "lora_rank": to("rank", int),
    "lora_alpha": to("alpha", float),
    "lora_dropout": to("dropout", float),
    "target_modules": to("targets", targets),
    "use_rslora": on({"use_rslora": True}),
    "use_dora": on({"method": "dora"}),
    "init_weights": lost("see --init"),
    "lorap_lr_ratio": to("lora_plus_ratio", float),
    "modules_to_save": lost("parts of the base to train in full: --trainable embedding head norm"),
    "adapters": to("adapter"),
    "torch_dtype": _dtype,
    "quant_bits": bits,
    "quant_method": lost("bases are packed in bitsandbytes' formats"),
    "bnb_4bit_quant_type": nothing("see quant"),
    "bnb_4bit_use_double_quant": on({"double_quant": True}),
    "bnb_4bit_compute_dtype": nothing("see dtype"),
    "max_length": _max_length,
    "truncation_strategy": chosen(
        "on_overlong",
        {"delete": "drop", "left": "truncate", "right": "truncate", "raise": "error"},
        "see --on-overlong",
    ),
    "template": template,
    "system": to("system"),
    "loss_scale": chosen("train_on", {"default": "assistant", "last_round": "last", "all": "all"}, "see --train-on"),
    "packing": nothing("rows are packed where the model keeps them apart exactly"),
    "padding_free": nothing("always"),
    "streaming": nothing("data larger than memory is read in pieces anyway"),
    "lazy_tokenize": nothing("speed only"),
    "load_from_cache_file": nothing("what is cached is found by its content"),
    "use_hf": nothing("Hub names are of the Hugging Face Hub"),
    "model_author": nothing("truetune export --to card"),
    "model_name": nothing("truetune export --to card"),
    "attn_impl": nothing("speed only"),
    "create_checkpoint_symlink": nothing("checkpoints are found by their step"),
    "add_version": nothing("--out is taken as it is"),
    "deepspeed": nothing("another way to share memory between devices; the result is the same"),
}


def _defaults(said: Mapping[str, Any]) -> Mapping[str, Any]:
    kind = said.get("tuner_type", said.get("train_type", said.get("sft_type", "lora")))
    own: dict[str, Any] = {**DEFAULTS, "schedule": "cosine", "warmup": 0.05, "weight_decay": 0.1}
    if kind == "lora":
        own |= {"rank": 8, "alpha": 32.0, "dropout": 0.05}
    return own | {"lr": 1e-5 if kind == "full" else 1e-4}


PROGRAM = Program(
    "ms-swift",
    frozenset({"tuner_type", "train_type", "sft_type", "split_dataset_ratio", "lora_rank", "torch_dtype"}),
    RULES,
    _defaults,
    ("per_device_train_batch_size", "gradient_accumulation_steps"),
    (1, 16),
)
