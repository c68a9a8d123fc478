"""The base of all optimizers here: state per tensor, in 32 bits or in 8, stepped by one kernel."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from truetune.errors import ConfigError
from truetune.ops import optim8bit
from truetune.ops.update_rule import Kind, Rule
from truetune.optim import state as states
from truetune.optim.clipping import percentile_scale
from truetune.optim.override import keeps_32bit
from truetune.optim.rules import Group

BLOCKSIZES = (64, 128, 256, 512, 1024, 2048, 4096)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Options(TypedDict, total=False):
    """What every optimizer takes beside its formula's own; the first two concern 8 bits only."""

    min_8bit_size: int
    """Tensors with fewer elements keep their state in 32 bits (default 4096)."""
    blocksize: int
    """Values that share a scale (default 256, the only one that bitsandbytes reads)."""
    percentile_clipping: int
    """Clip each tensor's gradient at this percentile of its last hundred norms (default 100: off)."""


@dataclass(frozen=True)
class Settings:
    """``Options``, checked."""

    min_8bit_size: int = 4096
    blocksize: int = 256
    percentile_clipping: int = 100

    def __post_init__(self) -> None:
        if self.blocksize not in BLOCKSIZES:
            raise ConfigError(
                f"blocksize: found {self.blocksize}, expected one of {', '.join(map(str, BLOCKSIZES))}"
            )  # fmt: skip
        if not 1 <= self.percentile_clipping <= 100:
            raise ConfigError(
                f"percentile_clipping: found {self.percentile_clipping}, expected 1 to 100", ("100", "no clipping")
            )


class BlockwiseOptimizer(torch.optim.Optimizer):
    """Abstract: a final class says how many bits, and which rule.

    Parameters may be float32, bfloat16 or float16, on any device; their gradients may be of another of these types. All
    arithmetic is float32, and a parameter is rounded once. Elements whose new moments are not finite (because the
    gradient is not, or its square) start anew: their moments become 0, the parameter stays as it was.

    State dicts are those of the optimizer of the same name in bitsandbytes: either loads the other's.
    """

    bits: ClassVar[int]
    kind: ClassVar[Kind]

    @staticmethod
    def rule(group: Group, t: int) -> Rule:
        """The scalars of step ``t``, counted from 1."""
        raise NotImplementedError

    def __init__(self, params: ParamsT, group: dict[str, Any], options: Options, *, max_unorm: float = 0.0) -> None:
        if self.bits == 32 and (given := set(options) & {"min_8bit_size", "blocksize"}):
            raise ConfigError(f"{' and '.join(sorted(given))}: for state in 8 bits; {type(self).__name__} has none")
        _check(group)
        self.settings = Settings(**options)
        self.max_unorm = max_unorm
        super().__init__(params, group)

    def __getstate__(self) -> dict[str, Any]:
        own = {"settings": self.settings, "max_unorm": self.max_unorm}
        return dict(super().__getstate__()) | own

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step; returns what ``closure`` returns, which may compute the gradients.

        Raises:
            ConfigError: a sparse gradient, or a parameter of another dtype.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            rules: dict[int, Rule] = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                _check_tensor(p, p.grad)
                state: dict[str, Any] = self.state[p] or self._started(p)
                t = state["step"] = int(state["step"]) + 1
                if t not in rules:
                    rules[t] = self.rule(group, t)
                self._step_tensor(p, p.grad, state, rules[t])
        return loss

    def _started(self, p: Tensor) -> dict[str, Any]:
        small = p.numel() < self.settings.min_8bit_size or keeps_32bit(p)
        bits = 32 if small else self.bits
        state = self.state[p] = states.start(p, self.kind, bits=bits, blocksize=self.settings.blocksize)
        return state

    def _step_tensor(self, p: Tensor, grad: Tensor, state: dict[str, Any], rule: Rule) -> None:
        flat, g = p.detach().contiguous().view(-1), grad.detach().contiguous().view(-1)
        moments, blocksize = states.moments(state, rule.kind), self.settings.blocksize
        if self.settings.percentile_clipping < 100:
            rule = replace(rule, scale=percentile_scale(state, g, self.settings.percentile_clipping))
        if self.max_unorm:
            u2, p2 = optim8bit.square_sums(rule, flat, g, moments, blocksize=blocksize)
            rule = replace(rule, size=rule.size * self._trust(state, u2**0.5, p2**0.5, p))
        optim8bit.step(rule, flat, g, moments, blocksize=blocksize)
        if not p.is_contiguous():
            p.copy_(flat.view(p.shape))

    def _trust(self, state: dict[str, Any], update: float, parameter: float, p: Tensor) -> float:
        """What bounds the update's norm by ``max_unorm`` times the parameter's; a parameter of zeros has no say."""
        state["unorm_vec"] = torch.full((1,), update, device=p.device)
        bound = self.max_unorm * parameter
        return bound / update if 0.0 < bound < update else 1.0

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with bitsandbytes' keys."""
        found: dict[str, Any] = super().state_dict()
        found["state"] = {index: states.exported(state, self.kind) for index, state in found["state"].items()}
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state of this optimizer or of bitsandbytes'; hyper-parameters of the groups come with it.

        Raises:
            CheckpointError: the state is another optimizer's, or of other shapes.
            ValueError: the groups are others (torch's own check).
        """
        # torch would cast codes to the parameter's dtype, so it is given the groups alone.
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        indices = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for index, p in zip(indices, chain.from_iterable(group["params"] for group in self.param_groups), strict=True):
            if saved := state_dict["state"].get(index):
                self.state[p] = states.imported(saved, p, self.kind, blocksize=self.settings.blocksize)


def _check(group: Mapping[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay"):
        if not 0.0 <= float(group[name]) < math.inf:
            raise ConfigError(f"{name}: found {group[name]}, expected 0 or more")
    for beta in group["betas"]:
        if not 0.0 <= float(beta) < 1.0:
            raise ConfigError(f"betas, momentum or alpha: found {beta}, expected 0 or more, and less than 1")


def _check_tensor(p: Tensor, grad: Tensor) -> None:
    if p.dtype not in _DTYPES:
        raise ConfigError(
            f"a parameter of type {_name(p.dtype)}", ("expected", ", ".join(map(_name, _DTYPES))),
            ("way out", "torch.optim's optimizers keep to the parameter's own type"),
        )  # fmt: skip
    if grad.layout is not torch.strided:
        raise ConfigError("a sparse gradient", ("way out", "a dense one: sparse=False in the embedding"))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
