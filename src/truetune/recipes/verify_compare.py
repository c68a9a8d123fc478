"""The trained model's own words on every sample, and how far an artefact's are from them."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from truetune.adapters.inject import attachment, detach
from truetune.adapters.virtual import virtual_ids
from truetune.errors import TruetuneError
from truetune.eval.agreement import Agreement, agreement, loss_sum, pooled, recorded_agreement, top_log_probabilities
from truetune.eval.limits import LIMITS, Measured, Verdict, coarser, judge
from truetune.models import load
from truetune.recipes import verify_texts
from truetune.recipes.verify_reference import Reference, Sample
from truetune.recipes.verify_subjects import Answer, Loaded, Subject, prompt_agrees


@dataclass
class Finding:
    """One row of the table.

    Attributes:
        prompts, answers: (same, compared).
        stopped: (answers of the artefact that a stop token ended, those of the trained model).
        held_out_loss: of the artefact and of the trained model, nats per token.
        ties: of each answer that differs, how far its choice is behind where the two part, in nats.
        effect_share: the artefact's mean KL as a share of what training changed.
        example: the first prompt and the first answer that differ.
    """

    name: str
    loader: str
    kind: str
    verdict: Verdict
    reasons: list[str]
    logits: Agreement | None = None
    prompts: tuple[int, int] | None = None
    answers: tuple[int, int] | None = None
    stopped: tuple[int, int] | None = None
    held_out_loss: tuple[float, float] | None = None
    effect_share: float | None = None
    example: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    ties: list[float] = field(default_factory=list)


@dataclass
class _HeldOut:
    """The loss over the compared positions of the held-out samples."""

    total: float = 0.0
    count: int = 0

    def add(self, sample: Sample, scores: Tensor) -> None:
        """One sample's [n, vocab]; those of training rows do not count."""
        if sample.part == "held_out":
            self.total += loss_sum(scores, sample.targets)
            self.count += len(sample.positions)

    @property
    def mean(self) -> float | None:
        """Nats per token; None without a held-out sample."""
        return self.total / self.count if self.count else None


class Trained:
    """What the trained model says; its logits are kept in files, so that two models are never in memory at once.

    Use it as a context manager: the files go with it.
    """

    def __init__(self, reference: Reference, samples: Sequence[Sample], kind: str) -> None:
        self.reference, self.samples, self.kind = reference, list(samples), kind
        self.answers: list[Answer] = []
        self._likely: list[tuple[Tensor, Tensor]] = []
        self._decode: verify_texts.Decode  # known once the model has been asked
        self.effect: Agreement | None = None
        self.loss: float | None = None
        self.askable: list[Sample] = []
        self._folder = tempfile.TemporaryDirectory(prefix="truetune-verify-")
        self._shapes: list[tuple[int, int]] = []

    def __enter__(self) -> Trained:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def ask(self, live: Loaded, *, longest: int) -> list[Agreement]:
        """Record all that is compared later; of a model with an adapter also what the adapter changes.

        Returns:
            For each sample of which a run wrote that down, the agreement with it.
        """
        kept, losses = [], _HeldOut()
        for number, sample in enumerate(self.samples):
            scores = live.logits(sample)
            if sample.top_ids:
                kept.append(against_record(scores, sample))
            losses.add(sample, scores)
            self._keep(number, scores)
        self.loss = losses.mean
        room = load.context_length(live.model.config)
        taken = len(virtual_ids(live.model)) + longest
        self.askable = [s for s in self.samples if room is None or len(s.prompt) + taken <= room]
        self.answers = live.answers(self.askable, longest) if self.askable else []
        self._decode = partial(live.tokenizer.hf.decode, skip_special_tokens=True)
        self._likely = [_likeliest(live, s, a) for s, a in zip(self.askable, self.answers, strict=True)]
        attached = attachment(live.model)
        # Off the base again it is the base, unless it trained or grew parts of that.
        if attached and attached.grew_from is None and not (attached.full_modules or attached.config.trainable):
            detach(live.model)
            found = [agreement(live.logits(s), self.logits(i)) for i, s in enumerate(self.samples)]
            self.effect = pooled(found)
        return kept

    def logits(self, number: int) -> Tensor:
        """[n, vocab] float32 of a sample."""
        rows, columns = self._shapes[number]
        flat = torch.from_file(str(self._file(number)), size=rows * columns, dtype=torch.float32)
        return flat.view(rows, columns)

    def gap(self, number: int, other: Answer) -> float:
        """How far another answer's choice is behind where it parts from the trained model's, in nats.

        Infinite where it is none of the likeliest. Of an answer that is text alone, it is the least that this can be.
        """
        mine = self.answers[number]
        own, theirs = mine.ids or (), other.ids
        if theirs is None:
            place = verify_texts.parts_at(own, mine.stopped, other.text, self._decode)
        else:
            place = next((i for i, (one, two) in enumerate(zip(own, theirs, strict=False)) if one != two), None)
        if place is None:
            return math.inf
        likely = self._likely[number][0][place], self._likely[number][1][place]
        if theirs is None:
            return verify_texts.gap_at(place, own, other.text, likely, self._decode)
        ids, values = (tensor.tolist() for tensor in likely)
        return float(values[0] - dict(zip(ids, values, strict=True)).get(theirs[place], -math.inf))

    def _keep(self, number: int, scores: Tensor) -> None:
        self._shapes.append((scores.shape[0], scores.shape[1]))
        scores.contiguous().numpy().tofile(self._file(number))

    def _file(self, number: int) -> Path:
        return Path(self._folder.name) / f"{number}.f32"


def _likeliest(live: Loaded, sample: Sample, answer: Answer) -> tuple[Tensor, Tensor]:
    """At each token of an answer, the likeliest ids and their log-probabilities, both [n, k]."""
    ids = answer.ids or ()
    tokens = (*sample.prompt, *ids)
    places = tuple(range(sample.prompt_tokens, len(tokens)))
    scores = live.logits(replace(sample, tokens=tokens, positions=places)) if places else torch.zeros(0, _LIKELIEST)
    return top_log_probabilities(scores, _LIKELIEST)


_LIKELIEST = 256


def against_record(scores: Tensor, sample: Sample) -> Agreement:
    """How far logits are from what the run wrote down at its end."""
    return recorded_agreement(scores, torch.tensor(sample.top_ids), torch.tensor(sample.top_logprobs))


def hold_against(trained: Trained, subject: Subject, *, longest: int) -> Finding:
    """Ask an artefact everything the trained model was asked, and judge it."""
    kind = coarser(subject.kind, trained.kind)
    finding = Finding(subject.name, subject.loader, kind, "unknown", [], notes=list(subject.notes))
    _compare_prompts(trained, subject, finding)
    _compare_logits(trained, subject, finding)
    _compare_answers(trained, subject, finding, longest)
    losses = finding.held_out_loss
    measured = Measured(
        logits=finding.logits,
        effect=trained.effect,
        loss_change=losses[0] - losses[1] if losses else None,
        prompts=finding.prompts,
        answers=finding.answers,
        lost_stops=subject.lost_stops(trained.reference),
        faults=subject.faults,
        ties=finding.ties,
    )
    finding.verdict, finding.reasons = judge(measured, kind)
    if near := sum(gap <= LIMITS[kind].tie for gap in finding.ties):
        finding.notes.append(f"{near} of the answers part where two tokens are about equally likely")
    return finding


def failed(name: str, loader: str, error: TruetuneError, *, kind: str = "–") -> Finding:
    """An artefact that is there and does not load: it says nothing, and surely not the same."""
    because = "; ".join(text for label, text in error.notes if label in ("because", "tensors"))
    said = error.message.removeprefix("--model: ")  # a setting of other commands; here it is an artefact
    return Finding(name, loader, kind, "drift", [said + (f" ({because})" if because else "")])


def _compare_prompts(trained: Trained, subject: Subject, finding: Finding) -> None:
    judged = [(sample, prompt_agrees(subject, sample)) for sample in trained.samples]
    compared = [(sample, same) for sample, same in judged if same is not None]
    if not compared:
        return
    finding.prompts = sum(bool(same) for _, same in compared), len(compared)
    if differing := next((sample for sample, same in compared if not same), None):
        found = subject.prompt(differing)
        finding.example["prompt"] = {"row": differing.row, "trained": differing.text, "found": found and found[0]}


def _compare_logits(trained: Trained, subject: Subject, finding: Finding) -> None:
    parts, losses = [], _HeldOut()
    for number, sample in enumerate(trained.samples):
        found = subject.logits(sample)
        if found is None:
            return
        parts.append(agreement(found, trained.logits(number)))
        losses.add(sample, found)
    finding.logits = pooled(parts)
    if trained.effect and trained.effect.mean_kl > 1e-9:
        finding.effect_share = finding.logits.mean_kl / trained.effect.mean_kl
    if losses.mean is not None and trained.loss is not None:
        finding.held_out_loss = losses.mean, trained.loss


def _compare_answers(trained: Trained, subject: Subject, finding: Finding, longest: int) -> None:
    answers = subject.answers(trained.askable, longest) if trained.askable else None
    if answers is None:
        return
    same = [_same(one, other) for one, other in zip(answers, trained.answers, strict=True)]
    finding.answers = sum(same), len(same)
    finding.stopped = sum(a.stopped for a in answers), sum(a.stopped for a in trained.answers)
    finding.ties = [trained.gap(i, answers[i]) for i, alike in enumerate(same) if not alike]
    if not all(same):
        i = same.index(False)
        finding.example["answer"] = {
            "row": trained.askable[i].row, "trained": trained.answers[i].text, "found": answers[i].text
        }  # fmt: skip


def _same(one: Answer, other: Answer) -> bool:
    if one.ids is not None and other.ids is not None:
        return one.ids == other.ids
    return verify_texts.alike(one.text, other.text) and one.stopped == other.stopped
