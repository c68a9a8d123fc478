"""A cell's run, and the model that it left."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import truetune
from families import token_rows
from matrix.cells import PACKED, Cell
from training_runs import run_sft
from truetune.adapters.methods import trained_parts
from truetune.config.methods import METHODS
from truetune.quant.linear8bit import unrounded
from virtual_checks import text_logits

STEPS, SAVED = 32, 20  # the second is in the midst of AdaLoRA's decisions and of LISA's draws


@dataclass(frozen=True)
class Tuned:
    """What is left of a run, and how to start it again.

    Attributes:
        base: folder of the base's checkpoint.
        data: file of the rows.
        out: folder of the run.
    """

    cell: Cell
    base: Path
    data: Path
    out: Path

    @property
    def settings(self) -> dict[str, Any]:
        length = {"max_steps": STEPS, "epochs": STEPS, "save_every": SAVED, "batch_size": 16, "verify_prompts": 2}
        return {**length, **self.cell.flags}

    def run(self, out: Path, **more: Any) -> dict[str, Any]:
        """The run in another folder."""
        return run_sft(self.base, self.data, out, **(self.settings | more))

    @property
    def result(self) -> Path:
        """The adapter, or the model."""
        return self.out / self.cell.can.result

    @property
    def is_rounded(self) -> bool:
        """Whether what was trained in float32 is kept in bfloat16: parts of the base are, adapters are not."""
        own = METHODS[self.cell.method].config
        given = {name: value for name, value in self.cell.flags.items() if name in own.model_fields}
        trains_base = self.cell.can.result == "model" or bool(trained_parts(own(**given)))
        return self.cell.kind == "bfloat16" and trains_base

    def load_base(self, **settings: Any) -> Any:
        """The base as the run had it, unless told otherwise."""
        packed = {"quant": self.cell.kind} if self.cell.kind in PACKED else {}
        return truetune.load(str(self.base), **(packed | settings))

    def load(self, adapter: Path | None = None, **settings: Any) -> Any:
        """What the run left, loaded as anyone loads it.

        Args:
            adapter: another copy of its adapter.
        """
        if self.cell.can.result == "model":
            return truetune.load(str(self.result), **settings)
        model = self.load_base(**settings)
        truetune.load_adapter(model, str(adapter or self.result))
        return model


def text(model: PreTrainedModel, ids: Tensor | None = None) -> Tensor:
    """[B, T, vocab] float32 of a text, behind the model's own virtual tokens; int8 without rounding what comes in.

    With that rounding a difference in the last bit may tip an entry over to the next of 255 steps, and what two orders
    of summation agree on could not be told to more than a few hundredths.
    """
    with unrounded():
        return text_logits(model, ids).float()


def pefts_text(model: Any) -> Tensor:
    """[B, T, vocab] float32 of the same text by PEFT, which puts its virtual tokens in front itself."""
    ids = token_rows()
    with torch.no_grad():
        scores: Tensor = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return scores[:, -ids.shape[1] :].float()
