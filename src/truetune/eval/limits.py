"""How far an artefact may be from the model that was trained before it counts as another model.

Each kind is allowed more than its rounding did to two small models; docs/proof.md has the figures. The smaller one, of
260,000 weights, sets those of 4 bits and the answers of int8. Larger models have not been measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from truetune.eval.agreement import Agreement

Verdict = Literal["faithful", "drift", "unknown"]

_SCALE = 10.0  # logits up to here are held to ``delta`` as it is, larger ones to as many of their digits


@dataclass(frozen=True)
class Limits:
    """What is still the same model.

    Attributes:
        delta: largest difference of two logits, for logits up to 10; None where rounding alone exceeds any such bound.
        kl: mean KL in nats per token.
        top1: least share of equal first choices.
        loss: largest difference of the held-out losses, nats per token.
        answers: least share of equal greedy answers.
        share: largest share of what training changed (by KL); above, rounding can't be told from a fault.
        tie: tokens so many nats apart are about equally likely: rounding may choose either.
    """

    delta: float | None
    kl: float
    top1: float
    loss: float
    answers: float
    share: float
    tie: float


LIMITS: dict[str, Limits] = {
    "fp32": Limits(delta=1e-4, kl=1e-6, top1=0.99, loss=1e-4, answers=0.9, share=0.01, tie=1e-3),
    "bf16": Limits(delta=None, kl=0.01, top1=0.95, loss=0.02, answers=0.5, share=0.2, tie=0.25),
    "fp16": Limits(delta=None, kl=0.002, top1=0.97, loss=0.01, answers=0.7, share=0.1, tie=0.05),
    "int8": Limits(delta=None, kl=0.03, top1=0.9, loss=0.05, answers=0.1, share=0.3, tie=0.5),
    "nf4": Limits(delta=None, kl=0.3, top1=0.6, loss=0.3, answers=0.0, share=0.5, tie=1.0),
    "fp4": Limits(delta=None, kl=0.5, top1=0.5, loss=0.5, answers=0.0, share=0.5, tie=1.0),
}
LIMITS |= {
    "gguf-f32": LIMITS["fp32"],
    "gguf-f16": LIMITS["fp16"],
    "gguf-bf16": LIMITS["bf16"],
    "gguf-q8_0": Limits(delta=None, kl=0.01, top1=0.93, loss=0.02, answers=0.4, share=0.2, tie=0.5),
    "gguf-q6": LIMITS["int8"],
    "gguf-q5": Limits(delta=None, kl=0.1, top1=0.8, loss=0.15, answers=0.0, share=0.4, tie=0.75),
    "gguf-q4": LIMITS["nf4"],
}
"""By how an artefact is stored or computed; ``LIMITS`` of the coarser of two, as ``coarser`` finds it."""

_COARSENESS = (
    "fp32", "gguf-f32", "fp16", "gguf-f16", "bf16", "gguf-bf16", "gguf-q8_0", "int8", "gguf-q6", "gguf-q5", "nf4",
    "gguf-q4", "fp4",
)  # fmt: skip


def coarser(one: str, other: str) -> str:
    """The one of two kinds that rounds more."""
    return max(one, other, key=_COARSENESS.index)


@dataclass(frozen=True)
class Measured:
    """What was found of one artefact; None for what could not be measured.

    Attributes:
        logits: against the model that was trained.
        effect: the base against it, the same way: what training changed at all.
        loss_change: held-out loss, artefact minus trained.
        prompts: (same, compared) prompts that came out as the same ids.
        answers: (same, compared) greedy answers.
        ties: of each answer that is not the same, how far the artefact's choice is behind where the two part, in nats.
        lost_stops: stop tokens that were trained and do not end an answer of the artefact.
        faults: what the artefact says of itself that is not so of the trained model, as sentences.
    """

    logits: Agreement | None = None
    effect: Agreement | None = None
    loss_change: float | None = None
    prompts: tuple[int, int] | None = None
    answers: tuple[int, int] | None = None
    lost_stops: Sequence[str] = ()
    faults: Sequence[str] = ()
    ties: Sequence[float] = ()


def judge(measured: Measured, kind: str) -> tuple[Verdict, list[str]]:
    """The verdict on an artefact of a kind of ``LIMITS``, and each reason that is not in its favour."""
    limits = LIMITS[kind]
    drift = [*measured.faults, *_of_logits(measured, limits), *_of_use(measured, limits)]
    if drift:
        return "drift", drift
    nothing = (measured.logits, measured.prompts, measured.answers) == (None, None, None)
    doubts = ["nothing of it could be compared"] if nothing else _doubts(measured, limits)
    return ("unknown", doubts) if doubts else ("faithful", [])


def _of_logits(measured: Measured, limits: Limits) -> list[str]:
    found = measured.logits
    if found is None:
        return []
    if not found.finite:
        return ["its logits are not all numbers: a weight or a product overflows"]
    reasons = []
    if limits.delta is not None and found.max_delta > (allowed := limits.delta * max(1.0, found.largest / _SCALE)):
        reasons.append(f"logits differ by up to {found.max_delta:.3g}, allowed are {allowed:.3g}")
    if found.mean_kl > limits.kl:
        reasons.append(f"mean KL is {found.mean_kl:.3g} nats per token, allowed are {limits.kl:g}")
    if (top1 := found.top1_within(limits.tie)) < limits.top1:
        reasons.append(
            f"{top1:.1%} of the first choices are the same or about as likely, expected at least {limits.top1:.0%}"
        )
    if measured.loss_change is not None and not abs(measured.loss_change) <= limits.loss:
        reasons.append(f"held-out loss differs by {measured.loss_change:+.3g}, allowed are {limits.loss:g}")
    if measured.effect and _is_the_base(found, measured.effect):
        reasons.append("it is as far from the trained model as the base itself: the training is not in it")
    return reasons


def _is_the_base(found: Agreement, effect: Agreement) -> bool:
    """Whether an artefact is about as far from the trained model as the model before training was."""
    return effect.mean_kl > 1e-9 and abs(found.mean_kl - effect.mean_kl) < 0.02 * effect.mean_kl


def _of_use(measured: Measured, limits: Limits) -> list[str]:
    """What whoever asks it would meet."""
    reasons = []
    if measured.prompts and measured.prompts[0] < measured.prompts[1]:
        same, of = measured.prompts
        reasons.append(f"{of - same} of {of} prompts become other tokens than those that were trained")
    if measured.lost_stops:
        reasons.append(f"an answer no longer ends at {', '.join(measured.lost_stops)}, which was trained to end it")
    if measured.answers:
        same, of = measured.answers
        near = sum(gap <= limits.tie for gap in measured.ties)
        if same + near < limits.answers * of:
            more = f", and {near} part between two tokens about as likely" if near else ""
            reasons.append(f"{same} of {of} greedy answers are the same{more}, expected at least {limits.answers:.0%}")
    return reasons


def _doubts(measured: Measured, limits: Limits) -> list[str]:
    found, effect = measured.logits, measured.effect
    if not found or not effect or effect.mean_kl <= 1e-9 or found.mean_kl <= limits.share * effect.mean_kl:
        return []
    share = found.mean_kl / effect.mean_kl
    return [
        f"the difference is within its kind's rounding, and {share:.0%} of all that training changed: "
        "too much to tell it from a fault"
    ]
