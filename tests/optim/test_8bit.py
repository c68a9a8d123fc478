"""The 8-bit optimizers: how near they stay to those of 32 bits, and what they take."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

import truetune as tt
from truetune import optim
from truetune.errors import ConfigError
from truetune.ops import dispatch

NAMES = ("Adam", "AdamW", "AdEMAMix", "Lion", "RMSprop", "Adagrad", "SGD", "LAMB", "LARS")


def made(name: str, parameters: list[Parameter], **settings: Any) -> Any:
    return getattr(optim, name)(parameters, **({"lr": 1e-3} | settings))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def step(optimizer: Any, gradient: Tensor) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = gradient.to(p.dtype).expand(p.shape).clone()
    optimizer.step()


RATES = {
    "Lion": 1e-3,
    "RMSprop": 1e-3,
    "SGD": 3e-2,
    "LAMB": 3e-2,
    "LARS": 1.0,
    "Adagrad": 4e-3,
}  # else 2e-3; steps move about 5e-4


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 6e-5), (torch.bfloat16, 1.7e-4)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_step_stays_near_that_of_32_bits(name: str, dtype: torch.dtype, bound: float) -> None:
    """The mean difference after any of fifty steps, each begun from the same parameter: bitsandbytes' own bounds.

    The states are not brought together again, so their errors do add up.
    """
    eight, wide = (Parameter((draw(64, 80) * 0.1).to(dtype)) for _ in range(2))
    ours, theirs = (made(kind, [p], lr=RATES.get(name, 2e-3)) for kind, p in ((f"{name}8bit", eight), (name, wide)))
    moved = 0.0
    for number in range(50):
        before = wide.detach().clone()
        gradient = draw(64, 80, seed=number + 1) * 0.01
        step(ours, gradient)
        step(theirs, gradient)
        assert float((eight - wide).detach().abs().mean()) < bound
        moved += float((wide.detach() - before).abs().mean())
        eight.data.copy_(wide.data)
    assert ours.state[eight]["state1"].dtype == torch.uint8
    assert moved / 50 > 1.5 * bound  # were the steps no larger than the bound, anything would pass


@pytest.mark.parametrize(
    ("name", "rate"),
    [("AdamW", 3e-2), ("AdEMAMix", 2e-2), ("Lion", 2e-2), ("RMSprop", 2e-2), ("Adagrad", 2e-1), ("SGD", 3e-1)],
)
def test_it_learns_as_well(name: str, rate: float) -> None:
    """A linear map from noisy batches: after two hundred steps of their own, both are about as near to it."""
    x, truth = draw(1024, 64), draw(64, 64, seed=1)
    y = x @ truth + 2 * draw(1024, 64, seed=2)

    def loss_after(known: str, steps: int) -> float:
        weight, batches = Parameter(torch.zeros(64, 64)), torch.Generator().manual_seed(5)
        optimizer = made(known, [weight], lr=rate)
        for number in range(steps):
            rows = torch.randint(0, 1024, (16,), generator=batches)
            optimizer.param_groups[0]["lr"] = rate * (1 - number / steps)
            optimizer.zero_grad()
            (x[rows] @ weight - y[rows]).square().sum(1).mean().div(64).backward()
            optimizer.step()
        return float((x @ weight.detach() - y).square().mean())

    start, eight, wide = loss_after(name, 0), loss_after(f"{name}8bit", 200), loss_after(name, 200)
    assert wide < start / 5
    assert eight == pytest.approx(wide, rel=0.03)


@pytest.mark.parametrize(("name", "moments"), [("Adam", 2), ("Lion", 1), ("AdEMAMix", 3), ("RMSprop", 1)])
def test_state_takes_a_byte_per_moment_and_a_scale_per_block(name: str, moments: int) -> None:
    def taken(known: str) -> int:
        p = Parameter(draw(100, 333))
        optimizer = made(known, [p])
        step(optimizer, draw(100, 333))
        return sum(t.nbytes for t in optimizer.state[p].values() if isinstance(t, Tensor))

    blocks = -(-33_300 // 256)
    assert taken(f"{name}8bit") == moments * (33_300 + 4 * blocks)
    assert taken(name) == moments * 4 * 33_300


def test_small_tensors_keep_32_bits() -> None:
    sizes = {4095: torch.float32, 4096: torch.uint8, 10: torch.float32}
    parameters = [Parameter(draw(size)) for size in sizes]
    optimizer = made("AdamW8bit", parameters)
    step(optimizer, torch.tensor(0.1))
    assert [optimizer.state[p]["state2"].dtype for p in parameters] == list(sizes.values())
    all_8bit = made("AdamW8bit", parameters, min_8bit_size=0)
    step(all_8bit, torch.tensor(0.1))
    assert {all_8bit.state[p]["state1"].dtype for p in parameters} == {torch.uint8}


def test_a_larger_block_has_fewer_scales() -> None:
    p = Parameter(draw(10_000))
    optimizer = made("AdamW8bit", [p], blocksize=2048)
    step(optimizer, draw(10_000))
    assert len(optimizer.state[p]["absmax1"]) == 5


def test_a_parameter_that_is_not_dense_steps_as_its_dense_copy() -> None:
    dense, turned = Parameter(draw(80, 70)), Parameter(draw(80, 70).t().contiguous().t())
    assert not turned.is_contiguous()
    for number in range(3):
        for p in (dense, turned):
            p.grad = draw(80, 70, seed=number)
    optimizers = [made("AdamW8bit", [p]) for p in (dense, turned)]
    for optimizer in optimizers:
        optimizer.step()
    assert torch.equal(dense, turned)


def test_lower_precision_is_rounded_once() -> None:
    wide, narrow = Parameter((draw(5000)).bfloat16().float()), Parameter(draw(5000).bfloat16())
    gradient = draw(5000, seed=1).bfloat16()
    for p in (wide, narrow):
        step(made("AdamW8bit", [p]), gradient)
    assert torch.equal(wide.detach().bfloat16(), narrow)


def test_a_gradient_that_is_not_finite_harms_one_element() -> None:
    p = Parameter(draw(5000))
    optimizer, before = made("AdamW8bit", [p]), draw(5000)
    gradient = draw(5000, seed=1)
    gradient[3] = float("nan")
    step(optimizer, gradient)
    assert (p == before).nonzero().flatten().tolist() == [3]
    assert optimizer.state[p]["absmax1"].isfinite().all()


def test_every_tier_makes_the_same_run() -> None:
    runs = []
    for tier in ("reference", "auto"):
        with dispatch.forced(tier):
            p = Parameter(draw(70, 70))
            optimizer = made("AdamW8bit", [p])
            for number in range(5):
                step(optimizer, draw(70, 70, seed=number + 1))
            runs.append((p.detach(), optimizer.state[p]["state1"]))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_groups_schedules_and_closures_are_torch_s() -> None:
    first, second = Parameter(draw(70, 70)), Parameter(draw(70, 70))
    optimizer = made("SGD8bit", [{"params": [first], "lr": 0.0}])
    optimizer.add_param_group({"params": [second], "lr": 1.0})
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))

    def closure() -> Tensor:
        loss = first.sum() + second.sum()
        loss.backward()
        return loss.detach()

    assert optimizer.step(closure) == pytest.approx(float(2 * draw(70, 70).sum()))
    schedule.step()
    assert torch.equal(first, draw(70, 70))
    torch.testing.assert_close(second.detach(), draw(70, 70) - 1)
    assert optimizer.param_groups[1]["lr"] == 0.5


def test_a_parameter_without_a_gradient_is_left_alone() -> None:
    used, unused = Parameter(draw(70, 70)), Parameter(draw(70, 70))
    optimizer = made("AdamW8bit", [used, unused])
    used.grad = draw(70, 70)
    optimizer.step()
    assert torch.equal(unused, draw(70, 70))
    assert unused not in optimizer.state


def test_a_copy_and_a_pickle_go_on_by_themselves() -> None:
    p = Parameter(draw(70, 70))
    optimizer = made("LAMB8bit", [p], blocksize=64, percentile_clipping=50)
    step(optimizer, draw(70, 70, seed=1))
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    for other in (copy.deepcopy(optimizer), torch.load(file, weights_only=False)):
        (its,) = other.param_groups[0]["params"]
        step(other, draw(70, 70, seed=2))
        assert (other.settings, other.max_unorm) == (optimizer.settings, 1.0)
        assert len(other.state[its]["absmax1"]) == -(-4900 // 64)
    for known in (optimizer, other):
        assert known.state[known.param_groups[0]["params"][0]]["step"] == (1 if known is optimizer else 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr: found -1.0, expected 0 or more"),
        ({"eps": float("nan")}, "eps: found nan"),
        ({"weight_decay": -0.1}, "weight_decay: found -0.1"),
        ({"betas": (0.9, 1.0)}, "found 1.0, expected 0 or more, and less than 1"),
        ({"blocksize": 100}, "blocksize: found 100, expected one of 64, 128"),
        ({"percentile_clipping": 0}, "percentile_clipping: found 0, expected 1 to 100"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made("AdamW8bit", [Parameter(draw(3))], **settings)


def test_a_setting_that_would_do_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="blocksize and min_8bit_size: for state in 8 bits; AdamW has none"):
        made("AdamW", [Parameter(draw(3))], blocksize=64, min_8bit_size=1)
    with pytest.raises(ConfigError, match="momentum: found 0, which leaves no state to keep"):
        made("SGD8bit", [Parameter(draw(3))], momentum=0.0)


def test_what_cannot_be_stepped_is_refused_before_anything_changes() -> None:
    double = Parameter(draw(3).double())
    double.grad = double.detach()
    with pytest.raises(ConfigError, match="a parameter of type float64"):
        made("AdamW8bit", [double]).step()
    table = nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    optimizer = made("AdamW8bit", list(table.parameters()))
    with pytest.raises(ConfigError, match="a sparse gradient"):
        optimizer.step()
    assert not optimizer.state


def test_every_optimizer_is_reached_from_the_package() -> None:
    assert {f"{name}{bits}" for name in NAMES for bits in ("", "8bit")} | {"override_32bit"} == set(tt.optim.__all__)
    for name in tt.optim.__all__:
        assert getattr(tt.optim, name).__doc__
