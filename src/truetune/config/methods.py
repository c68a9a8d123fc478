"""What each tuning method can do: one table, enforced when a config is parsed.

Asking for what a method cannot do is an error before any weight is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MethodName = Literal["lora", "full"]


@dataclass(frozen=True)
class Capabilities:
    """What the rest of the house may do with a method's result."""

    mergeable: bool
    servable: bool
    quantised_base: bool
    batchable_per_row: bool
    peft_format: bool


METHODS: dict[str, Capabilities] = {
    "lora": Capabilities(mergeable=True, servable=True, quantised_base=True, batchable_per_row=True, peft_format=True),
    "full": Capabilities(
        mergeable=False, servable=True, quantised_base=False, batchable_per_row=False, peft_format=False
    ),
}
