"""Which token comes next: cuts, penalties and draws by their formulas."""

import pytest
import torch
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from truetune.errors import ModelError
from truetune.generate.request import Sampling
from truetune.generate.sample import Draws, draw, uniform

LOGITS = torch.randn(50, generator=torch.Generator().manual_seed(0)) * 2


def drawable(sampling: Sampling) -> set[int]:
    return {draw(LOGITS, sampling, at / 4000) for at in range(4000)}


@pytest.mark.parametrize(
    ("sampling", "warper"),
    [
        (Sampling(temperature=1.0, top_k=7), TopKLogitsWarper(7)),
        (Sampling(temperature=1.0, top_p=0.6), TopPLogitsWarper(0.6)),
        (Sampling(temperature=1.0, min_p=0.2), MinPLogitsWarper(0.2)),
    ],
)
def test_cuts_leave_what_transformers_leaves(sampling: Sampling, warper: object) -> None:
    kept = warper(torch.zeros(1, 1, dtype=torch.long), LOGITS[None].clone())[0]  # type: ignore[operator]
    assert drawable(sampling) == set(torch.isfinite(kept).nonzero()[:, 0].tolist())


def test_a_token_is_drawn_as_often_as_it_is_likely() -> None:
    sampling = Sampling(temperature=2.0)
    found = torch.zeros(50)
    for at in range(10_000):
        found[draw(LOGITS, sampling, (at + 0.5) / 10_000)] += 1
    assert (found / 10_000 - (LOGITS / 2).softmax(0)).abs().max() <= 1.01e-4  # one of the draws


def test_places_of_an_answer_are_drawn_independently() -> None:
    draws = torch.tensor([uniform(0, place) for place in range(4000)])
    assert abs(float(draws.mean()) - 0.5) < 0.02  # four standard errors
    assert len(set(draws.tolist())) > 3990
    assert uniform(0, 1) != uniform(1, 1)


def test_the_repetition_penalty_is_transformers() -> None:
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([[3, 4, 4, 9]]), LOGITS[None].clone())[0]
    draws = Draws(Sampling(repetition_penalty=1.7), [3, 4])
    for token in (4, 9):
        draws.took(token)
    assert torch.equal(draws.penalised(LOGITS), expected)


def test_presence_and_frequency_count_the_answer_alone() -> None:
    draws = Draws(Sampling(presence_penalty=0.5, frequency_penalty=0.25), [3])
    for token in (4, 4, 9):
        draws.took(token)
    expected = LOGITS.clone()
    expected[4] -= 0.5 + 2 * 0.25
    expected[9] -= 0.5 + 0.25
    assert torch.allclose(draws.penalised(LOGITS), expected)


def test_logits_that_are_no_numbers_are_an_error() -> None:
    for sampling in (Sampling(), Sampling(temperature=1.0)):
        with pytest.raises(ModelError, match="not finite"):
            Draws(sampling, []).choose(torch.full((5,), float("nan")))
