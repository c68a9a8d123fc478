"""Which ranks AdaLoRA keeps: importance from smoothed sensitivity, under a budget that shrinks.

Zhang et al. 2023, arXiv:2303.10512, sections 3.1 to 3.3; details the paper leaves open are as in its authors' code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from truetune.config.lora import AdaLoRA

BETA = 0.85  # of both smoothings


class SVDLayer(Protocol):
    """A layer with A [r, in], B [out, r] and E [r, 1], and room for what is measured of them."""

    lora_a: Parameter
    lora_b: Parameter
    lora_e: Parameter
    steps: int | None
    measured: dict[str, Tensor]


@dataclass(frozen=True)
class Phases:
    """Steps, counted from 1: until ``first`` all ranks stay, after ``last`` nothing changes any more."""

    first: int
    last: int
    every: int

    @classmethod
    def of(cls, config: AdaLoRA, steps: int) -> Phases:
        """Those of a run; at least one step lies between."""
        first = min(round(config.prune_from * steps), steps - 1)
        return cls(first, max(first + 1, round(config.prune_until * steps)), config.prune_every)

    def budget(self, step: int, start: int, target: int) -> int:
        """Ranks of all layers together after a step: cubic from ``start`` to ``target`` (section 3.3)."""
        left = 1 - (min(max(step, self.first), self.last) - self.first) / (self.last - self.first)
        return int(target + (start - target) * left**3)

    def decides(self, step: int) -> bool:
        """Whether ranks are taken away, or given back, after this step."""
        return self.first < step <= self.last and (step % self.every == 0 or step == self.last)


class RankAllocation:
    """The ranks of one run's layers.

    Its state lies in the layers, as ``measured``: for A, B and E what each element has mattered on average
    (``sensitivity``) and how unsteadily (``uncertainty``), both of the shape of the parameter; and which ranks are left
    (``kept`` [r]).

    Args:
        layers: by path.
        steps: of the run.
    """

    def __init__(self, layers: Mapping[str, SVDLayer], config: AdaLoRA, steps: int) -> None:
        self.layers = list(layers.values())
        self.phases, self.weight = Phases.of(config, steps), config.orthogonality
        self.start, self.target = config.rank * len(self.layers), config.target_rank * len(self.layers)
        for layer in self.layers:
            layer.steps, layer.measured = steps, {"kept": torch.ones(config.rank, dtype=torch.bool)}
            for name, parameter in _triplet(layer).items():
                for what in ("sensitivity", "uncertainty"):
                    layer.measured[f"{name}.{what}"] = torch.zeros_like(parameter, requires_grad=False)

    def penalty(self) -> Tensor:
        """γ · mean of ‖A Aᵀ - I‖ and ‖Bᵀ B - I‖ over all layers (section 3.1), a scalar.

        The paper has the sum of squared norms; γ is to be read as in its authors' code, which has the mean of norms.
        """
        grams = [
            gram for layer in self.layers for gram in (layer.lora_a @ layer.lora_a.T, layer.lora_b.T @ layer.lora_b)
        ]
        stacked = torch.stack(grams)
        identity = torch.eye(stacked.shape[1], device=stacked.device)
        norms: Tensor = torch.linalg.matrix_norm(stacked - identity)
        return self.weight * norms.mean()

    @torch.no_grad()
    def after_update(self, step: int) -> None:
        """Measure, decide, and take away; called after an update, while its gradients are still there.

        Args:
            step: counted from 0.
        """
        step += 1
        if step <= self.phases.last:
            self._measure()
        if self.phases.decides(step):
            self._allocate(self.phases.budget(step, self.start, self.target))
        elif step > self.phases.last:
            self._take_away()

    def _measure(self) -> None:
        """I = |w ∂L/∂w|; Ī ← β Ī + (1 - β) I; Ū ← β Ū + (1 - β) |I - Ī| (section 3.2)."""
        pairs = [(p, layer.measured, name) for layer in self.layers for name, p in _triplet(layer).items()]
        parameters: list[Tensor] = [p for p, _, _ in pairs]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        sensitivity = [measured[f"{name}.sensitivity"] for _, measured, name in pairs]
        uncertainty = [measured[f"{name}.uncertainty"] for _, measured, name in pairs]
        now = list(torch._foreach_mul(parameters, gradients))
        torch._foreach_abs_(now)
        torch._foreach_mul_(sensitivity, BETA)
        torch._foreach_add_(sensitivity, now, alpha=1 - BETA)
        apart = torch._foreach_sub(now, sensitivity)
        torch._foreach_abs_(apart)
        torch._foreach_mul_(uncertainty, BETA)
        torch._foreach_add_(uncertainty, apart, alpha=1 - BETA)

    def _allocate(self, budget: int) -> None:
        """Keep the ``budget`` ranks of all layers that matter most."""
        scores = [importance(layer.measured) for layer in self.layers]
        order = torch.cat(scores).argsort(descending=True, stable=True)
        kept = torch.zeros(len(order), dtype=torch.bool)
        kept[order[:budget].cpu()] = True
        for layer, mine in zip(self.layers, torch.split(kept, [len(s) for s in scores]), strict=True):
            layer.measured["kept"].copy_(mine)
        self._take_away()

    def _take_away(self) -> None:
        for layer in self.layers:
            layer.lora_e.masked_fill_(~layer.measured["kept"].to(layer.lora_e.device)[:, None], 0.0)


def importance(measured: Mapping[str, Tensor]) -> Tensor:
    """[r]: s(E) + mean of s(A) over the row + mean of s(B) over the column, where s = Ī Ū (section 3.2)."""
    score = {name: measured[f"{name}.sensitivity"] * measured[f"{name}.uncertainty"] for name in ("a", "b", "e")}
    return score["e"].flatten() + score["a"].mean(dim=1) + score["b"].mean(dim=0)


def _triplet(layer: SVDLayer) -> dict[str, Parameter]:
    return {"a": layer.lora_a, "b": layer.lora_b, "e": layer.lora_e}
