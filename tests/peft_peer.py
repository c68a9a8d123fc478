"""PEFT beside us: its adapters on the same tiny models, and ours read by it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft

from families import FAMILIES, perturb


@contextlib.contextmanager
def unwarned() -> Iterator[None]:
    """Without PEFT's advice on what these tests do on purpose, and what it makes transformers and torch say."""
    with warnings.catch_warnings():
        for text in (
            "fan_in_fan_out is set to", "Specified to not save vera_A", "Specified to not load vera_A",
            "Model has `tie_word_embeddings=True`", "The following rank_pattern keys did not match",
            r"Adapter 'default': \d+ LoRA tensor\(s\) have invalid shape",  # AdaLoRA takes all ranks from some layers
        ):  # fmt: skip
            warnings.filterwarnings("ignore", message=f".*{text}")
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*Found missing adapter keys", category=UserWarning)
        yield


def theirs(family: str, config: peft.PeftConfig) -> Any:
    """PEFT's model, moved from where it starts."""
    with unwarned():
        made = peft.get_peft_model(FAMILIES[family].make(), config)
    perturb(made)
    return made


def read_by_peft(family: str, folder: Path) -> Any:
    """What PEFT makes of a folder."""
    return read_onto(FAMILIES[family].make(), folder)


def read_onto(model: Any, folder: Path) -> Any:
    """What PEFT makes of a model and a folder."""
    with unwarned():
        return peft.PeftModel.from_pretrained(model, str(folder))


def saved_by_peft(model: Any, folder: Path) -> Path:
    """The folder that PEFT writes."""
    with unwarned():
        model.save_pretrained(str(folder))
    return folder


def trained_by(model: Any) -> int:
    """Number of trained parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
