"""What a training run is made of once everything is decided and before any weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from truetune.adapters.files import AdapterFile
from truetune.adapters.vocabulary import NewTokens
from truetune.config.adapter import AdapterConfig
from truetune.config.sft import TrainConfig
from truetune.models.precision import Precision
from truetune.models.tokenizer import ChatTokenizer
from truetune.recipes.data import Prepared
from truetune.recipes.run_folder import RunFolder

TRAINING_ONLY = ("dropout", "dora_dropout")
"""Settings of methods that a trained adapter does not depend on."""


@dataclass(frozen=True)
class Setup:
    """The decisions of a run.

    ``facts`` are those that a resumed run must find again; the ones that need the loaded model (packing, tokens per
    micro-batch) are added when it is there. ``new`` are tokens that the base does not have, ``token_rows`` the ids
    whose rows are trained. ``start`` is the adapter that the run goes on from, ``on`` one that stays frozen beneath.
    """

    config: TrainConfig
    folder: RunFolder
    tokenizer: ChatTokenizer
    model_config: Any
    prepared: Prepared
    precision: Precision
    device: str
    facts: dict[str, Any]
    new: NewTokens | None = None
    token_rows: tuple[int, ...] = ()
    start: AdapterFile | None = None
    on: AdapterFile | None = None

    @property
    def adapter(self) -> AdapterConfig:
        """The method's settings, with the rows of the tokens that are trained beside it."""
        own = self.config.method_settings()
        if self.start is None:
            return own.model_copy(update={"token_rows": self.token_rows})
        anew = {name: getattr(own, name) for name in TRAINING_ONLY if name in type(own).model_fields}
        return self.start.settings.model_copy(update=anew)  # which knows more of itself than settings can say

    @property
    def prompt_ids(self) -> list[int]:
        """The ids of the text that virtual tokens start from, where one is given."""
        text = getattr(self.config.method_settings(), "prompt_text", None)
        return self.tokenizer.encode([text])[0] if text else []
