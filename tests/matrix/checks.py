"""The promises, one function each: what holds of every cell, whatever its method, kind of base and family."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import truetune
from families import distance
from matrix.bases import GUESSING, answer_loss, encoded, task
from matrix.tuned import SAVED, Tuned, pefts_text, text
from method_checks import CLOSE
from packed import dense_twin
from peft_peer import read_onto, saved_by_peft
from training_runs import cut_after, differences
from truetune.errors import AdapterError
from truetune.models.layers import decoder_layers
from truetune.quant.linear8bit import Linear8bit, unrounded
from truetune.recipes import verify_reference
from virtual_checks import check_generation, text_logits

LEARNED = GUESSING / 2  # nats per trained token; the bases are above 5
SIXTH = 2e-6  # what a run writes down is rounded to six places
KEPT = 0.1  # nats, by the tokens' own chances, where parts trained in float32 are kept in bfloat16
ROUNDED = 0.05  # of what is rounded to bfloat16 once more; an adapter left out or doubled is off by 0.5

INPUTS = 0.05  # of all logits' size: what eight bits of the inputs do in int8; up to 0.027 was seen
LARGE = 32.0  # a power of two, so that what is multiplied by it can be divided again; a lost outlier is off by 0.3


def same(one: Tensor, other: Tensor, *, rounded: bool = False) -> None:
    """Equal up to another order of summation; with ``rounded``, on the whole: single entries may be off by more."""
    if rounded:
        off = float((one - other).norm() / one.norm())
        assert off <= ROUNDED, f"off by {off:.3g} of its size"
    else:
        off = distance(one, other)
        assert off <= CLOSE, f"off by {off:.3g} of the largest logit"


def equal(one: Tensor, other: Tensor) -> None:
    """To the bit."""
    assert torch.equal(one, other), f"not the same bits: off by {distance(one, other):.3g} of the largest logit"


def learns(tuned: Tuned, live: Any, folder: Path) -> None:
    """It does what the base is sure is wrong, by plain logits of the loaded model."""
    ids = encoded(AutoTokenizer.from_pretrained(tuned.base), task())
    before, after = (float(answer_loss(text(model, ids), ids)) for model in (tuned.load_base(), live))
    assert before > 1.5 * GUESSING, f"the base's loss is {before:.2f}"
    assert after < LEARNED, f"the loss of {before:.2f} fell to {after:.2f} only"


def is_read_back(tuned: Tuned, live: Any, folder: Path) -> None:
    """What is loaded computes what the run computed at its end, and so does what is saved and loaded once more."""
    reference = verify_reference.read(tuned.out / verify_reference.FILE)
    assert reference.samples
    for sample in reference.samples:
        kept = torch.tensor(sample.top_logprobs)
        found = verify_reference.logits_of(live, sample).log_softmax(-1).gather(-1, torch.tensor(sample.top_ids))
        off = (found - kept).abs()
        gap = float((off * kept.exp()).sum(-1).max() if tuned.is_rounded else off.max())
        assert gap <= (KEPT if tuned.is_rounded else SIXTH), f"ln p off by {gap:.3g}"
    if tuned.cell.can.result == "adapter":
        truetune.save_adapter(live, str(folder / "again"))
        equal(text(tuned.load(folder / "again")), text(live))


def merges(tuned: Tuned, live: Any, folder: Path) -> None:
    """What it is folded into is a plain model that says the same; where that can not be, it is refused."""
    cell = tuned.cell
    if cell.can.result == "model":
        equal(text(AutoModelForCausalLM.from_pretrained(tuned.result)), text(live))
        return
    if not cell.can.mergeable:
        with pytest.raises(AdapterError, match="does not fold into weights"):
            truetune.merge(str(tuned.base), str(tuned.result), str(folder / "merged"))
        assert not (folder / "merged").exists()
        return
    truetune.merge(str(tuned.base), str(tuned.result), str(folder / "merged"))
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged")
    same(text(live), text(merged), rounded=cell.kind == "bfloat16")


def is_pefts(tuned: Tuned, live: Any, folder: Path) -> None:
    """PEFT reads its file and says the same, and what PEFT writes then is read here; else PEFT refuses it.

    On a packed base PEFT has what the packed layers stand for; both compute in float32, whatever the base is kept in.
    """
    if tuned.cell.can.result == "model":
        return
    base = dense_twin(tuned.load_base(dtype="float32"))
    if not tuned.cell.is_pefts:
        with pytest.raises(
            (KeyError, ValueError), match=r"^'TRUETUNE_\w+'$|^Unsupported model type for adaption prompt"
        ):
            read_onto(base, tuned.result)
        return
    theirs, ours = read_onto(base, tuned.result), text(tuned.load(dtype="float32"))
    same(ours, pefts_text(theirs))
    equal(text(tuned.load(saved_by_peft(theirs, folder / "peft"), dtype="float32")), ours)


def resumes(tuned: Tuned, live: Any, folder: Path) -> None:
    """Stopped in the middle and taken up again, it ends in the same bits: result, optimizer, log and report."""
    out = cut_after(tuned.out, SAVED, folder / "resumed")
    tuned.run(out, resume="auto")
    assert differences(tuned.out, out) == []


def pads(tuned: Tuned, live: Any, folder: Path) -> None:
    """Rows of a batch, behind padding on the left, with a cache, say what each says alone and whole."""
    with unrounded():
        check_generation(live, exact=tuned.cell.kind != "bfloat16")
    if tuned.cell.kind == "int8":
        check_generation(live, exact=False)


def rounds(tuned: Tuned, live: Any, folder: Path) -> None:
    """Int8 as it is run, with inputs in 8 bits: close to the products with the dense weight, outliers or not.

    Large models have columns far above all others, and tiny ones have none: here one is made. Set apart it costs the
    others nothing; among them it would leave them the coarse steps of the largest.
    """
    if tuned.cell.kind != "int8":
        return
    assert (off := _rounding(live)) <= INPUTS, f"off by {off:.3g} of its size"
    with _outliers(live):
        apart = _rounding(live)
        with _none_apart(live):
            among = _rounding(live)
    assert apart <= INPUTS, f"with outliers: off by {apart:.3g} of its size"
    assert apart < among, f"off by {apart:.3g} with outliers apart, by {among:.3g} with them among the others"


def _rounding(live: Any) -> float:
    """How much of the text's logits eight bits of the inputs change."""
    dense, rounded = text(live), text_logits(live).float()
    return float((rounded - dense).norm() / dense.norm())


@contextlib.contextmanager
def _outliers(live: Any) -> Iterator[None]:
    """Inside, what a norm gives to projections has a first column that is far larger than the others."""
    norms = [part for layer in decoder_layers(live) for part in layer.modules() if "Norm" in type(part).__name__]
    firsts = [norm.get_parameter("weight").detach()[:1] for norm in norms]
    assert firsts
    for first in firsts:
        first.mul_(LARGE)
    try:
        yield
    finally:
        for first in firsts:
            first.div_(LARGE)


@contextlib.contextmanager
def _none_apart(live: Any) -> Iterator[None]:
    """Inside, outliers are rounded among all others."""
    thresholds = {part: part.threshold for part in live.modules() if isinstance(part, Linear8bit)}
    assert thresholds
    for part in thresholds:
        part.threshold = 0.0
    try:
        yield
    finally:
        for part, threshold in thresholds.items():
            part.threshold = threshold


ALL = (learns, is_read_back, merges, is_pefts, resumes, pads, rounds)
