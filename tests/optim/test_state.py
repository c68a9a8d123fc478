"""State dicts: a run that goes on from one is the run, and bitsandbytes' optimizers read ours as we read theirs."""

import io
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from truetune import optim
from truetune.errors import CheckpointError

NAMES = ("Adam", "AdamW", "AdEMAMix", "Lion", "RMSprop", "Adagrad", "SGD", "LAMB", "LARS")
BOTH = [f"{name}{bits}" for name in NAMES for bits in ("", "8bit")]


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parameters() -> list[Parameter]:
    """One of many blocks, the last of them short; and one too small for 8 bits."""
    return [Parameter(draw(90, 77, seed=0)), Parameter(draw(33, seed=1))]


def advance(optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for number in range(first, last):
        for index, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            p.grad = (draw(*p.shape, seed=100 * index + number) * 0.01).to(p.dtype)
        optimizer.step()


def held(optimizer: torch.optim.Optimizer) -> list[Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def same(one: torch.optim.Optimizer, other: torch.optim.Optimizer) -> bool:
    """Parameters and state, to the bit."""
    states = [(one.state[p], other.state[q]) for p, q in zip(held(one), held(other), strict=True)]
    return all(map(torch.equal, held(one), held(other))) and all(
        torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key])) for a, b in states for key in a.keys() | b.keys()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BOTH)
def test_steps_save_load_steps_are_the_run_to_the_bit(name: str, dtype: torch.dtype) -> None:
    whole = getattr(optim, name)([Parameter(p.detach().to(dtype)) for p in parameters()], percentile_clipping=60)
    advance(whole, 0, 6)
    part = getattr(optim, name)([Parameter(p.detach().to(dtype)) for p in parameters()], percentile_clipping=60)
    advance(part, 0, 3)
    file = io.BytesIO()
    torch.save(part.state_dict(), file)
    file.seek(0)
    other = getattr(optim, name)([Parameter(p.detach().clone()) for p in held(part)], lr=7.0, percentile_clipping=60)
    other.load_state_dict(torch.load(file, weights_only=True))
    advance(other, 3, 6)
    assert same(whole, other)


def test_a_loaded_state_is_a_copy() -> None:
    one, other = optim.AdamW8bit(parameters()), optim.AdamW8bit(parameters())
    advance(one, 0, 2)
    other.load_state_dict(one.state_dict())
    kept = other.state[held(other)[0]]["state1"].clone()
    advance(one, 2, 4)
    assert torch.equal(other.state[held(other)[0]]["state1"], kept)


def test_the_keys_are_bitsandbytes_s() -> None:
    optimizer = optim.AdamW8bit(parameters())
    advance(optimizer, 0, 1)
    large, small = optimizer.state_dict()["state"].values()
    assert set(large) == {"step", "state1", "state2", "absmax1", "absmax2", "qmap1", "qmap2"}
    assert set(small) == {"step", "state1", "state2"}
    assert (type(large["step"]), large["state1"].dtype, large["state1"].shape) == (int, torch.uint8, (90, 77))
    assert large["absmax2"].shape == (-(-90 * 77 // 256),)
    mixed = optim.AdEMAMix8bit(parameters())
    advance(mixed, 0, 1)
    state = mixed.state_dict()["state"][0]
    assert (state["state1"].shape, state["absmax1"].shape) == ((2, 90, 77), (2, -(-90 * 77 // 256)))


def change(state: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The saved state with entries of its first parameter replaced; None takes one out."""
    first = {key: value for key, value in (state["state"][0] | changes).items() if value is not None}
    return state | {"state": state["state"] | {0: first}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"state1": torch.zeros(90, 78)}, r"state1 of a parameter \[90, 77\]: found \[90, 78\], expected \[90, 77\]"),
        ({"state2": None}, "state2 of a parameter .*: found nothing"),
        ({"absmax1": torch.zeros(4)}, r"absmax1: found \[4\], expected \[28\] for blocks of 256"),
        ({"absmax2": -torch.ones(28)}, "absmax2 has values that no magnitude has"),
        ({"absmax2": torch.full((28,), torch.nan)}, "absmax2 has values that no magnitude has"),
        ({"qmap2": torch.linspace(0, 1, 256)}, "qmap2 is not the unsigned dynamic map"),
        ({"max_exp_avg_sq": torch.zeros(90, 77)}, "it has max_exp_avg_sq, which this optimizer does not know"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    optimizer = optim.AdamW8bit(parameters())
    advance(optimizer, 0, 1)
    with pytest.raises(CheckpointError, match=message):
        optim.AdamW8bit(parameters()).load_state_dict(change(optimizer.state_dict(), **changes))


def test_torch_s_state_is_another_optimizer_s() -> None:
    theirs = torch.optim.AdamW(parameters())
    advance(theirs, 0, 1)
    with pytest.raises(CheckpointError, match=r"state1 of a parameter .*: found nothing"):
        optim.AdamW8bit(parameters()).load_state_dict(theirs.state_dict())


@pytest.fixture(scope="module")
def peer() -> Any:
    return pytest.importorskip("bitsandbytes").optim


def settings(name: str, *, theirs: bool) -> dict[str, Any]:
    momentum = {"momentum": 0.9} if theirs and name.startswith(("SGD", "LARS")) else {}
    return {"lr": 1e-3, "weight_decay": 0.01, **momentum}


# In 8 bits, bitsandbytes leaves the bound on the update out.
MEETING = [name for name in BOTH if name not in ("LAMB8bit", "LARS8bit")]


@pytest.mark.parametrize("ours_first", [True, False], ids=["ours-to-theirs", "theirs-to-ours"])
@pytest.mark.parametrize("name", BOTH)
def test_a_step_from_the_other_s_state_is_the_other_s(name: str, ours_first: bool, peer: Any) -> None:
    """From a state of three steps, both make the next: the same, but for the order in which float32 is rounded."""
    rooms = (optim, peer) if ours_first else (peer, optim)
    one, other = (
        getattr(room, name)(parameters(), **settings(name, theirs=room is peer) | {"lr": rate})
        for room, rate in zip(rooms, (1e-3, 9.0), strict=True)  # the rate comes with the state
    )
    advance(one, 0, 3)
    other.load_state_dict(one.state_dict())
    for p, q in zip(held(one), held(other), strict=True):
        q.data.copy_(p.data)
    advance(one, 3, 4)
    advance(other, 3, 4)
    assert [other.state[p]["step"] for p in held(other)] == [4, 4]
    for p, q in list(zip(held(one), held(other), strict=True))[0 if name in MEETING else 1 :]:
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in BOTH if not name.endswith("8bit")])
def test_three_steps_in_32_bits_are_bitsandbytes_s(name: str, peer: Any) -> None:
    one, other = (getattr(room, name)(parameters(), **settings(name, theirs=room is peer)) for room in (optim, peer))
    advance(one, 0, 3)
    advance(other, 0, 3)
    for p, q in zip(held(one), held(other), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=2e-6)


def test_their_wrapped_state_and_a_plain_one_are_both_read(peer: Any) -> None:
    theirs = peer.AdamW8bit(parameters())
    advance(theirs, 0, 1)
    saved = theirs.state_dict()
    assert "__bnb_optimizer_quant_state__" in saved["state"][0]
    saved["state"][1].update(saved["state"][1].pop("__bnb_optimizer_quant_state__"))
    ours = optim.AdamW8bit(parameters())
    ours.load_state_dict(saved)
    for p, q in zip(held(ours), held(theirs), strict=True):
        assert torch.equal(ours.state[p]["state2"], theirs.state[q]["state2"])
