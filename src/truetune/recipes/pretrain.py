"""``truetune pretrain``: (continued) pre-training on raw text."""

from __future__ import annotations

from typing import Any

from truetune.config.resolve import Resolved
from truetune.config.sft import PretrainConfig
from truetune.recipes.data import prepare_pretrain
from truetune.recipes.training import run_training
from truetune.recipes.verify import after_training


def run(resolved: Resolved[PretrainConfig]) -> dict[str, Any]:
    """Train as the config says; returns what ``--json`` prints."""
    return after_training(run_training(resolved, prepare_pretrain), resolved.config)
