"""Figures of the plan, for many rows."""

import torch

from truetune.data.plan import StepPlan
from truetune.data.schema import Origin
from truetune.data.token_set import TokenSet
from truetune.recipes import plan_report


class Counted(TokenSet):
    """Counts how often all lengths are worked out, each time in as many steps as there are rows."""

    asked = 0

    @property
    def lengths(self) -> torch.Tensor:
        Counted.asked += 1
        return super().lengths


def plan(rows: int, *, packing: bool) -> StepPlan:
    sizes = [1 + i % 7 for i in range(rows)]
    origins = [Origin("rows", i) for i in range(rows)]
    data = Counted.from_lists([[0] * n for n in sizes], [[True] * n for n in sizes], origins)
    return StepPlan.build(data, batch_size=8, micro_tokens=32, packing=packing, seed=0, epochs=1, max_steps=None)


def test_the_figures_take_time_in_proportion_to_the_rows() -> None:
    padded = plan(400, packing=False)
    Counted.asked = 0
    fill, tokens = plan_report.fill(padded), plan_report._step_tokens(padded)
    assert Counted.asked <= 4
    assert 0.5 < fill < 1
    assert 8 < tokens <= 56
    assert plan_report.fill(plan(400, packing=True)) == 1.0
