"""How a checkpoint is quantised, by what its config says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from truetune.config.quant import QuantRecipe
from truetune.errors import ModelError
from truetune.quant.stack import OWN

READ = ("bitsandbytes", OWN)
"""``quant_method`` of the checkpoints that can be read."""


def stored_recipe(config: Any) -> QuantRecipe | None:
    """How a checkpoint is quantised, by its config; None for one that is not, or in a form that is not read.

    Raises:
        ModelError: a setting of it that this version can't follow.
    """
    fields = quantization_fields(config)
    if method_of(fields) not in READ:
        return None
    listed, experts = fields.get("llm_int8_skip_modules") or (), method_of(fields) == OWN
    if not isinstance(listed, (list, tuple)):
        raise ModelError(f"--model: llm_int8_skip_modules {listed!r}", ("expected", "a list of names"))
    skip = tuple(map(str, listed))
    if fields.get("load_in_8bit") or (experts and fields.get("kind") == "int8"):
        if fields.get("llm_int8_has_fp16_weight"):
            raise ModelError("--model: quantised with llm_int8_has_fp16_weight, which stores no packed weights")
        threshold = fields.get("llm_int8_threshold", 6.0)
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not threshold >= 0:
            raise ModelError(f"--model: llm_int8_threshold {threshold!r}", ("expected", "a number, such as 6.0"))
        return QuantRecipe(kind="int8", skip=skip, threshold=float(threshold), of_checkpoint=True, experts=experts)
    key = "kind" if experts else "bnb_4bit_quant_type"
    kind = fields.get(key, "fp4")
    if kind not in ("nf4", "fp4"):
        raise ModelError(f"--model: {key} {kind!r}", ("expected", "nf4 or fp4"))
    double = bool(fields.get("bnb_4bit_use_double_quant"))
    return QuantRecipe(kind=kind, double=double, skip=skip, of_checkpoint=True, experts=experts)


def quantization_fields(config: Any) -> dict[str, Any]:
    """``quantization_config`` of a config; empty where there is none."""
    settings = getattr(config, "quantization_config", None)
    settings = settings or getattr(config.get_text_config(), "quantization_config", None) or {}
    return dict(settings) if isinstance(settings, Mapping) else dict(vars(settings))


def method_of(fields: Mapping[str, Any]) -> str:
    """Who quantised it; old configs of bitsandbytes don't say."""
    kind = fields.get("quant_method") or fields.get("quant_algo")
    if not kind and ("load_in_4bit" in fields or "load_in_8bit" in fields):
        return "bitsandbytes"
    return str(getattr(kind, "value", kind or ""))


def dense_config(config: Any) -> Any:
    """The config without its word on quantisation, which would call for the library that it names."""
    config = type(config).from_dict(config.to_dict() | {"quantization_config": None})
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config
