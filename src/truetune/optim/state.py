"""An optimizer's state of one parameter: how it starts, how kernels see it, and how it is exchanged.

In memory: ``step``, ``state1``, and with a second kind of moment ``state2``; both of the parameter's shape, of AdEMAMix
``state1`` [2, *shape]. They are float32, or uint8 with ``absmax1`` and ``absmax2``, one per block. That is
bitsandbytes' state, which also repeats the maps that codes stand for, ``qmap1`` and ``qmap2``: these are constants, so
they are added when a state is handed out, and compared when one comes in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from truetune.errors import CheckpointError
from truetune.ops.moment_codes import moment_map
from truetune.ops.optim8bit import Moment
from truetune.ops.update_rule import SIGNED, Kind

WRAPPED = "__bnb_optimizer_quant_state__"  # where bitsandbytes hides tensors that FSDP shall not gather
_EXTRAS = {"gnorm_vec", "unorm_vec"}


def start(p: Tensor, kind: Kind, *, bits: int, blocksize: int) -> dict[str, Any]:
    """All moments zero."""
    state: dict[str, Any] = {"step": 0}
    for number, (shape, _) in _slots(p, kind).items():
        dtype = torch.uint8 if bits == 8 else torch.float32
        state[f"state{number}"] = torch.zeros(shape, dtype=dtype, device=p.device)
        if bits == 8:
            state[f"absmax{number}"] = torch.zeros(_scales(p, shape, blocksize), device=p.device)
    return state


def moments(state: Mapping[str, Any], kind: Kind) -> list[Moment]:
    """As the kernels take them: flat, in the order of ``SIGNED``."""
    found = []
    for index, signed in enumerate(SIGNED[kind]):
        number = 1 if signed else 2
        values, absmax = state[f"state{number}"], state.get(f"absmax{number}")
        if kind == "ademamix" and signed:
            values, absmax = values[index], None if absmax is None else absmax[index]
        found.append(Moment(values.view(-1), absmax, signed))
    return found


def exported(state: Mapping[str, Any], kind: Kind) -> dict[str, Any]:
    """The state with its maps, as bitsandbytes keeps it."""
    return dict(state) | {
        f"qmap{number}": moment_map(signed, state[f"state{number}"].device)
        for number, signed in ((1, True), (2, False))
        if f"absmax{number}" in state and signed in SIGNED[kind]
    }


def imported(saved: Mapping[str, Any], p: Tensor, kind: Kind, *, blocksize: int) -> dict[str, Any]:
    """A saved state, ours or bitsandbytes', on the device of its parameter.

    Raises:
        CheckpointError: it is another optimizer's, of another shape, or its codes mean something else.
    """
    saved = {**saved, **saved.get(WRAPPED, {})}
    state: dict[str, Any] = {"step": int(saved.get("step", 0))}
    expected = {"step", WRAPPED, *_EXTRAS}
    for number, (shape, signed) in _slots(p, kind).items():
        values, absmax, qmap = (saved.get(f"{name}{number}") for name in ("state", "absmax", "qmap"))
        expected |= {f"{name}{number}" for name in ("state", "absmax", "qmap")}
        if not isinstance(values, Tensor) or tuple(values.shape) != shape:
            found = list(values.shape) if isinstance(values, Tensor) else "nothing"
            raise _refused(f"state{number} of a parameter {list(p.shape)}: found {found}, expected {list(shape)}")
        state[f"state{number}"] = _placed(values, p, torch.uint8 if values.dtype == torch.uint8 else torch.float32)
        if values.dtype == torch.uint8:
            state[f"absmax{number}"] = _placed(_checked(absmax, qmap, number, signed, shape, p, blocksize), p)
    if unknown := sorted(set(saved) - expected):
        raise _refused(f"it has {', '.join(unknown)}, which this optimizer does not know")
    return state | {name: _placed(saved[name], p) for name in _EXTRAS & set(saved)}


def _checked(
    absmax: Any, qmap: Any, number: int, signed: bool, shape: tuple[int, ...], p: Tensor, blocksize: int
) -> Tensor:
    expected = _scales(p, shape, blocksize)
    if not isinstance(absmax, Tensor) or tuple(absmax.shape) != expected:
        found = list(absmax.shape) if isinstance(absmax, Tensor) else "nothing"
        raise _refused(f"absmax{number}: found {found}, expected {list(expected)} for blocks of {blocksize}")
    if not bool((absmax.isfinite() & (absmax >= 0)).all()):
        raise _refused(f"absmax{number} has values that no magnitude has")
    if isinstance(qmap, Tensor) and not torch.equal(qmap.cpu(), moment_map(signed, torch.device("cpu"))):
        raise _refused(f"qmap{number} is not the {'signed' if signed else 'unsigned'} dynamic map")
    return absmax


def _slots(p: Tensor, kind: Kind) -> dict[int, tuple[tuple[int, ...], bool]]:
    """Number in the keys -> shape, and whether it is signed."""
    signs, shape = SIGNED[kind], tuple(p.shape)
    slots = {1: ((2, *shape) if kind == "ademamix" else shape, True)}
    return slots if signs[-1] else slots | {2: (shape, False)}


def _scales(p: Tensor, shape: tuple[int, ...], blocksize: int) -> tuple[int, ...]:
    blocks = -(-p.numel() // blocksize)
    return (blocks,) if shape == tuple(p.shape) else (2, blocks)


def _placed(tensor: Tensor, p: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A copy of its own, so that two optimizers never step on one state."""
    return tensor.detach().to(device=p.device, dtype=dtype, copy=True).contiguous()


def _refused(what: str) -> CheckpointError:
    return CheckpointError(
        f"the optimizer's saved state does not fit: {what}",
        ("expected", "a state_dict of the same optimizer, over the same parameters, with the same blocksize"),
    )
