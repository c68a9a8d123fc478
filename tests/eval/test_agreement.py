"""The measures of two models against each other, held against their definitions."""

import math

import pytest
import torch

from truetune.eval.agreement import (
    Agreement,
    agreement,
    loss_sum,
    pooled,
    recorded_agreement,
    top_log_probabilities,
)
from truetune.eval.limits import LIMITS, Measured, coarser, judge


def scores(rows: int = 40, vocab: int = 50, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def test_the_divergence_is_that_of_the_definition() -> None:
    p, q = scores(seed=1), scores(seed=2)
    found = agreement(q, p)
    wide_p, wide_q = p.double().softmax(-1), q.double().softmax(-1)
    assert found.mean_kl == pytest.approx(float((wide_p * (wide_p / wide_q).log()).sum(-1).mean()))
    assert found.max_delta == pytest.approx(float((p - q).abs().max()))
    assert found.top1 == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean()))
    assert found.largest == pytest.approx(float(p.abs().max()))
    assert found.positions == 40


def test_the_same_logits_are_the_same_and_a_shift_changes_no_probability() -> None:
    p = scores()
    assert agreement(p, p) == Agreement(0.0, 0.0, 1.0, float(p.double().abs().max()), 40)
    shifted = agreement(p.double() + 7, p.double())
    assert shifted.max_delta == pytest.approx(7)
    assert shifted.mean_kl < 1e-12


def test_parts_pool_to_the_whole() -> None:
    p, q = scores(seed=1), scores(seed=2)
    whole, parts = agreement(q, p), pooled([agreement(q[:7], p[:7]), agreement(q[7:], p[7:])])
    assert parts.mean_kl == pytest.approx(whole.mean_kl)
    assert (parts.max_delta, parts.positions) == (whole.max_delta, whole.positions)
    assert pooled([]).positions == 0


def test_a_larger_vocabulary_is_compared_where_both_have_tokens() -> None:
    p = scores()
    padded = torch.cat([p, torch.full((len(p), 3), -9.0)], dim=1)
    assert agreement(padded, p).mean_kl == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_is_never_close(bad: float) -> None:
    p, q = scores(), scores()
    q[3, 4] = bad
    found = agreement(q, p)
    assert (found.finite, found.max_delta, found.mean_kl, found.top1) == (False, math.inf, math.inf, pytest.approx(0.6))
    ids, values = top_log_probabilities(p, 4)
    assert not recorded_agreement(q, ids, values).finite
    assert loss_sum(q, torch.zeros(len(q), dtype=torch.int64)) == math.inf


def test_a_tie_is_no_other_choice() -> None:
    assert agreement(torch.tensor([[5.0, 1.0, 1.0]]), torch.tensor([[1.0, 5.0, 5.0]])).top1 == 0.0
    assert agreement(torch.tensor([[0.0, 5.0, 5.0]]), torch.tensor([[0.0, 4.0, 5.0]])).top1 == 1.0


def test_how_far_another_choice_is_behind() -> None:
    expected = torch.tensor([[0.0, 4.0, 3.5], [0.0, 1.0, 9.0], [2.0, 2.0, 1.0]])
    found = agreement(torch.tensor([[0.0, 3.0, 5.0], [0.0, 1.0, 9.0], [5.0, 1.0, 1.0]]), expected)
    assert (found.top1, found.gaps) == (pytest.approx(2 / 3), (pytest.approx(0.5),))
    assert [found.top1_within(nats) for nats in (0.4, 0.6)] == [pytest.approx(2 / 3), 1.0]
    assert pooled([found, found]).gaps == found.gaps * 2
    ids, values = top_log_probabilities(expected, 2)
    other = torch.tensor([[0.0, 3.0, 5.0], [9.0, 1.0, 2.0], [2.0, 1.0, 1.0]])
    assert recorded_agreement(other, ids, values).gaps == (pytest.approx(0.5), math.inf)  # and one beyond what is known


def test_a_record_of_all_tokens_gives_the_whole_divergence() -> None:
    p, q = scores(vocab=6, seed=1), scores(vocab=6, seed=2)
    ids, values = top_log_probabilities(p, 5)
    assert recorded_agreement(q, ids, values).mean_kl == pytest.approx(agreement(q, p).mean_kl, rel=1e-6)
    few = recorded_agreement(q, *top_log_probabilities(p, 2))
    assert 0 < few.mean_kl <= agreement(q, p).mean_kl + 1e-9  # of what is told apart, the divergence is no larger
    same = recorded_agreement(p, ids, values)
    assert (same.max_delta, same.top1) == (0.0, 1.0)


def close(**changes: object) -> Agreement:
    known = {"max_delta": 1e-6, "mean_kl": 1e-9, "top1": 1.0, "largest": 9.0, "positions": 10}
    return Agreement(**(known | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("measured", "says", "why"),
    [
        (Measured(close(), prompts=(4, 4), answers=(4, 4), loss_change=0.0), "faithful", ""),
        (Measured(close(max_delta=2e-4)), "drift", "logits differ"),
        (Measured(close(max_delta=2e-4, largest=30.0)), "faithful", ""),
        (Measured(close(mean_kl=1e-3)), "drift", "mean KL"),
        (Measured(close(top1=0.9, gaps=(0.5,))), "drift", "90.0% of the first choices"),
        (Measured(close(top1=0.9, gaps=(5e-4,))), "faithful", ""),  # between two that are as good as equal
        (Measured(close(), loss_change=math.nan), "drift", "held-out loss"),
        (Measured(close(), loss_change=-0.1), "drift", "held-out loss"),
        (Measured(close(finite=False)), "drift", "not all numbers"),
        (Measured(close(), prompts=(3, 4)), "drift", "1 of 4 prompts"),
        (Measured(close(), answers=(2, 4)), "drift", "2 of 4 greedy answers"),
        (Measured(close(), answers=(2, 4), ties=(5e-4, 0.5)), "drift", "and 1 part between two tokens"),
        (Measured(close(), answers=(2, 4), ties=(5e-4, 5e-4)), "faithful", ""),
        (Measured(close(), faults=["it says so"]), "drift", "it says so"),
        (Measured(close(), lost_stops=["</s>"]), "drift", "no longer ends at </s>"),
        (Measured(close(mean_kl=5e-7), effect=close(mean_kl=5e-7)), "drift", "the training is not in it"),
        (Measured(close(mean_kl=5e-7), effect=close(mean_kl=5e-6)), "unknown", "10% of all that training changed"),
        (Measured(close(mean_kl=5e-7), effect=close(mean_kl=5.0)), "faithful", ""),
        (Measured(), "unknown", "nothing of it could be compared"),
    ],
)
def test_each_bound_is_a_reason_of_its_own(measured: Measured, says: str, why: str) -> None:
    verdict, reasons = judge(measured, "fp32")
    assert verdict == says
    assert (why in reasons[0] and len(reasons) == 1) if why else reasons == []


def test_coarser_kinds_are_allowed_more() -> None:
    assert coarser("fp32", "bf16") == coarser("bf16", "fp32") == "bf16"
    assert coarser("int8", "fp32") == "int8"
    assert LIMITS["gguf-f16"].kl < LIMITS["gguf-q8_0"].kl < LIMITS["gguf-q5"].kl < LIMITS["gguf-q4"].kl
    assert LIMITS["fp32"].kl < LIMITS["fp16"].kl < LIMITS["bf16"].kl < LIMITS["int8"].kl < LIMITS["nf4"].kl
    assert judge(Measured(close(mean_kl=5e-3, max_delta=0.3)), "bf16")[0] == "faithful"
