"""truetune: fine-tune with few parameters, and prove that what was trained is what is served.

Nothing is imported here until it is asked for, so that ``truetune --help`` answers at once.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "AdaLoRA": "truetune.config.lora",
    "BitFit": "truetune.config.other_methods",
    "Bottleneck": "truetune.config.other_methods",
    "DoRA": "truetune.config.lora",
    "IA3": "truetune.config.other_methods",
    "LlamaAdapter": "truetune.config.other_methods",
    "LoRA": "truetune.config.lora",
    "PTuning": "truetune.config.other_methods",
    "Prefix": "truetune.config.other_methods",
    "Prompt": "truetune.config.other_methods",
    "SFTConfig": "truetune.config.sft",
    "VeRA": "truetune.config.lora",
    "add_tokens": "truetune.api",
    "attach": "truetune.api",
    "detach": "truetune.api",
    "list_adapters": "truetune.api",
    "load": "truetune.api",
    "load_adapter": "truetune.api",
    "merge": "truetune.api",
    "quantize": "truetune.api",
    "save_adapter": "truetune.api",
    "set_adapter": "truetune.api",
    "sft": "truetune.api",
    "trainable": "truetune.api",
}
_MODULES = ("errors", "nn", "optim")

__all__ = [
    "IA3",
    "AdaLoRA",
    "BitFit",
    "Bottleneck",
    "DoRA",
    "LlamaAdapter",
    "LoRA",
    "PTuning",
    "Prefix",
    "Prompt",
    "SFTConfig",
    "VeRA",
    "add_tokens",
    "attach",
    "detach",
    "errors",
    "list_adapters",
    "load",
    "load_adapter",
    "merge",
    "nn",
    "optim",
    "quantize",
    "save_adapter",
    "set_adapter",
    "sft",
    "trainable",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"truetune.{name}")
    raise AttributeError(f"module 'truetune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
