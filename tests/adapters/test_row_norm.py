"""The norms that DoRA divides by: what they are, and when they are formed anew."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from truetune.adapters.row_norm import RowNorm, rescaled

SCALE = 0.5


class Site:
    """A layer with A and B, and how often its weight was asked for."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.base = nn.Linear(12, 20, dtype=dtype).requires_grad_(False)
        self.a, self.b = Parameter(torch.randn(3, 12)), Parameter(torch.randn(20, 3))
        self.norm, self.asked = RowNorm(), 0

    def dense(self) -> Tensor:
        self.asked += 1
        return self.base.weight

    def of(self) -> Tensor:
        return self.norm.of(self.dense, self.base, (self.a, self.b), lambda: (self.a, self.b), SCALE)

    def truth(self) -> Tensor:
        whole = self.base.weight.double() + SCALE * self.b.double() @ self.a.double()
        return whole.norm(dim=1).detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_the_norm_of_the_rows_of_the_sum(dtype: torch.dtype) -> None:
    site = Site(dtype)
    found = site.of()
    assert found.dtype == torch.float32
    assert not found.requires_grad
    torch.testing.assert_close(found.double(), site.truth(), rtol=1e-6 if dtype == torch.float32 else 5e-3, atol=0)


def test_it_is_kept_as_long_as_nothing_changes() -> None:
    site = Site()
    assert site.of() is site.of()
    assert site.asked == 1


@pytest.mark.parametrize("what", ["a", "b", "weight"])
@pytest.mark.parametrize("how", ["written over", "put in its place"])
def test_it_follows_whatever_changes(what: str, how: str) -> None:
    site = Site()
    before = site.of()
    owner, name = (site.base, "weight") if what == "weight" else (site, what)
    tensor = getattr(owner, name)
    with torch.no_grad():
        if how == "written over":
            tensor.add_(1.0)
        else:
            setattr(owner, name, Parameter(tensor + 1.0, requires_grad=False))
    after = site.of()
    assert not torch.equal(after, before)
    torch.testing.assert_close(after.double(), site.truth(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("fused", [True, False])
def test_it_follows_a_step_of_an_optimizer_which_may_count_no_write(fused: bool) -> None:
    site = Site()
    optimizer = torch.optim.AdamW([site.a, site.b], lr=0.1, fused=fused)
    site.of()
    (site.a.sum() + site.b.sum()).backward()
    optimizer.step()
    torch.testing.assert_close(site.of().double(), site.truth(), rtol=1e-6, atol=0)


def test_a_ratio_is_of_the_norm_that_it_is_given_and_kept_where_nothing_learns() -> None:
    site = Site()
    magnitude = Parameter(torch.rand(20) + 1)
    first = site.norm.ratio(magnitude, site.of())
    assert first.requires_grad
    torch.testing.assert_close(first, magnitude / site.of())
    with torch.no_grad():
        assert site.norm.ratio(magnitude, site.of()) is site.norm.ratio(magnitude, site.of())
        site.b.mul_(2.0)
        torch.testing.assert_close(site.norm.ratio(magnitude, site.of()), magnitude / site.of())
        magnitude.mul_(3.0)
        torch.testing.assert_close(site.norm.ratio(magnitude, site.of()), magnitude / site.of())
    torch.testing.assert_close(site.norm.ratio(magnitude, site.of()), magnitude / site.of())


def test_what_is_kept_under_inference_mode_trains_afterwards() -> None:
    site = Site()
    magnitude = Parameter(torch.ones(20))
    with torch.inference_mode():
        site.norm.ratio(magnitude, site.of())
    site.norm.ratio(magnitude, site.of()).sum().backward()
    torch.testing.assert_close(magnitude.grad, 1 / site.of())


def test_a_row_of_zeros_has_norm_0_and_its_magnitude_for_a_ratio() -> None:
    site = Site()
    with torch.no_grad():
        site.base.weight[4], site.b[4] = 0.0, 0.0
    magnitude = Parameter(torch.full((20,), 2.0))
    assert site.of()[4] == 0
    assert site.norm.ratio(magnitude, site.of())[4] == 2
    merged = rescaled(site.base.weight, site.a.detach(), site.b.detach(), SCALE, magnitude.detach())
    assert not merged[4].any()
    torch.testing.assert_close(merged.norm(dim=1)[5:], magnitude.detach()[5:])
