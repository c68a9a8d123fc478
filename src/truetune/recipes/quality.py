"""How well a model answers held-out rows, measured outside of any run."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from truetune.data.formats import parse_rows
from truetune.data.mask import encode_rows
from truetune.data.pack import Batch
from truetune.data.plan import sequential_batches
from truetune.data.read import read_rows
from truetune.eval.perplexity import Evaluation, evaluate
from truetune.models import attention
from truetune.models.precision import Precision

if TYPE_CHECKING:
    from truetune.recipes.generate import Speaker


@dataclass(frozen=True)
class Quality:
    """Loss and accuracy on held-out answers, and the logits of the first batch for comparing two models."""

    evaluation: Evaluation
    batch: Batch
    logits: torch.Tensor  # [n, vocab], of ``batch``


def measure(speaker: Speaker, path: Path, *, limit: int, max_tokens: int = 2048) -> Quality:
    """Evaluate on the first ``limit`` rows of a file, worded by the speaker's template."""
    rows, _ = parse_rows(read_rows([str(path)])[0], "auto")
    examples, _ = encode_rows(rows[:limit], speaker.template, speaker.tokenizer, train_on="assistant")
    batches = sequential_batches(examples, max_tokens, packing=True)
    precision = Precision(speaker.model.dtype, None, "as loaded")
    with attention.segmented(speaker.model), torch.no_grad():
        logits = functools.partial(attention.trained_logits, speaker.model)
        evaluation = evaluate(logits, batches, autocast=functools.partial(precision.context, speaker.model.device.type))
        return Quality(evaluation, batches[0], logits(batches[0]).float())
