"""``truetune sft``: supervised fine-tuning."""

from __future__ import annotations

from typing import Any

from truetune.config.resolve import Resolved
from truetune.config.sft import SFTConfig
from truetune.recipes.data import prepare_sft
from truetune.recipes.training import run_training
from truetune.recipes.verify import after_training


def run(resolved: Resolved[SFTConfig]) -> dict[str, Any]:
    """Fine-tune as the config says; returns what ``--json`` prints."""
    return after_training(run_training(resolved, prepare_sft), resolved.config)
