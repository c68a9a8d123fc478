"""How well a model answers held-out rows, measured outside of any run."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from truetune.data.intake import Intake
from truetune.data.mask import encode_rows
from truetune.data.plan import sequential_batches
from truetune.data.read import read_rows
from truetune.eval.perplexity import Evaluation, evaluate
from truetune.models import forward
from truetune.models.precision import Precision
from truetune.models.survey import survey
from truetune.recipes.generate import Speaker

T = TypeVar("T")


@dataclass(frozen=True)
class Quality:
    """Loss and accuracy on held-out answers, and the logits of the first batch for comparing two models."""

    evaluation: Evaluation
    logits: torch.Tensor  # [n, vocab] float32, at the n trained tokens of the first batch


@dataclass(frozen=True)
class Contestant:
    """One of the models that are compared: how it does on held-out rows, and what it answered."""

    speaker: Speaker
    quality: Quality
    answers: list[str]


def spread(rows: Sequence[T], count: int) -> list[T]:
    """``count`` rows, evenly over a file that is ordered by module; all of them when there are no more."""
    count = min(count, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


def measure(
    speaker: Speaker, path: Path, *, limit: int, max_tokens: int = 2048, intake: Intake | None = None
) -> Quality:
    """Evaluate on ``limit`` rows spread over a file, worded by the speaker's template.

    Args:
        speaker: the model that answers.
        path: of the file.
        limit: rows at most.
        max_tokens: of a batch.
        intake: how the rows are understood, where their columns do not tell.
    """
    rows, _ = (intake or Intake())(read_rows([str(path)])[0], "auto")
    examples, _ = encode_rows(
        spread(rows, limit), speaker.template, speaker.tokenizer, train_on="assistant", system=speaker.system
    )
    batches = sequential_batches(examples, max_tokens, packing=True)
    precision = Precision(speaker.model.dtype, None, "as loaded")
    path_through = forward.Path(speaker.model, survey(speaker.model), packing=True)
    with forward.prepared(path_through), torch.no_grad():
        autocast = functools.partial(precision.context, speaker.model.device.type)
        evaluation = evaluate(path_through.scores, batches, autocast=autocast)
        first = torch.cat([scores.float() for scores, _ in path_through.scores(batches[0])])
        return Quality(evaluation, first)
