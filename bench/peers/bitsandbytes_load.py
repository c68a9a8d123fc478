"""transformers with bitsandbytes loads a checkpoint. Runs in the peer's own environment.

    python bitsandbytes_load.py MODEL nf4|none MARKS.json

``none`` is for a checkpoint that is packed already.
"""

from __future__ import annotations

import sys
from typing import Any

import bitsandbytes  # noqa: F401  (what the call would import is imported before it is timed)
import torch
import transformers.integrations.bitsandbytes
import transformers.models.llama.modeling_llama
import transformers.quantizers.quantizer_bnb_4bit  # noqa: F401
from marks import leave
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


def load(model: str, quant: str) -> Any:
    """NF4 with double quantised scales, computing in bf16."""
    settings: dict[str, Any] = {}
    if quant != "none":
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=quant, bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, **settings)


if __name__ == "__main__":
    leave(lambda: load(*sys.argv[1:3]), sys.argv[3])
