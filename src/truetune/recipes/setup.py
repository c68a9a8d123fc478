"""What a training run is made of once everything is decided and before any weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from truetune.config.sft import TrainConfig
from truetune.models.precision import Precision
from truetune.models.tokenizer import ChatTokenizer
from truetune.recipes.data import Prepared
from truetune.recipes.run_folder import RunFolder


@dataclass(frozen=True)
class Setup:
    """The decisions of a run.

    ``facts`` are those that a resumed run must find again; the ones that need the loaded model (packing, tokens per
    micro-batch) are added when it is there.
    """

    config: TrainConfig
    folder: RunFolder
    tokenizer: ChatTokenizer
    model_config: Any
    prepared: Prepared
    precision: Precision
    device: str
    facts: dict[str, Any]

    @property
    def prompt_ids(self) -> list[int]:
        """The ids of the text that virtual tokens start from, where one is given."""
        text = getattr(self.config.adapter(), "prompt_text", None)
        return self.tokenizer.encode([text])[0] if text else []
