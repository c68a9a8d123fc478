"""Low-rank adaptation of experts that are kept as one parameter, as PEFT's ``target_parameters`` has it.

    y_e = W_e x + s B_e A_e x    for every expert e;  Hu et al. 2021, arXiv:2106.09685, for each of them

W [experts, out, in] (or [experts, in, out], where the module says that it is transposed) belongs to a module that
routes tokens. Of a module that follows transformers' interface of experts only the experts that got tokens are
computed, each with its two thin products; no B_e A_e is formed. In any other module W + s B A stands in for W, which
costs a tensor of W's size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from truetune.adapters.base import Adapter, Change
from truetune.adapters.lora import A, B
from truetune.errors import AdapterError
from truetune.ops import experts, lowrank

_MAPS = {experts.GATED, experts.PLAIN, experts.LAST}


class ExpertUpdate(nn.Module):
    """A and B of all experts of one parameter.

    Args:
        a: [experts · r, in], expert by expert.
        b: [out, r · experts], where the expert changes fastest.
        transposed: the parameter is [experts, in, out].
    """

    def __init__(
        self, a: Tensor, b: Tensor, *, rank: int, alpha: float, rank_stabilised: bool, transposed: bool
    ) -> None:
        super().__init__()
        self.lora_a, self.lora_b = Parameter(a), Parameter(b)
        self.rank, self.alpha = rank, alpha
        self.scale = lowrank.scale(alpha, rank, rank_stabilised=rank_stabilised)
        self.transposed = transposed

    def pairs(self, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """``(A_e [r, in], B_e [out, r])`` of every expert."""
        return pairs_of(self.lora_a.to(dtype), self.lora_b.to(dtype), self.rank)

    def change(self, a: Tensor, b: Tensor) -> Change:
        """W -> W + s B A for tensors in place of its own."""
        return ExpertsChange(tuple(pairs_of(a, b, self.rank)), self.scale, self.transposed)

    def added_to(self, weight: Tensor) -> Tensor:
        """W + s B A, whole, with its gradients."""
        products = (_as_stored(b_e @ a_e, self.transposed) for a_e, b_e in self.pairs(weight.dtype))
        return torch.add(weight, torch.stack(list(products)).view_as(weight), alpha=self.scale)


@dataclass(frozen=True)
class ExpertsChange:
    """What merging makes of a parameter: W_e + s B_e A_e, expert by expert, each rounded once.

    Attributes:
        pairs: ``(A_e [r, in], B_e [out, r])`` of every expert.
        scale: s.
        transposed: the parameter is [experts, in, out].
    """

    pairs: Sequence[tuple[Tensor, Tensor]]
    scale: float
    transposed: bool

    def __call__(self, weight: Tensor) -> Tensor:
        """The parameter as it is stored -> a new one."""
        merged = torch.empty_like(weight)
        for one, into, (a, b) in zip(_each(weight), _each(merged), self.pairs, strict=True):
            into.copy_(_as_stored(lowrank.fold(_as_stored(one, self.transposed), a, b, self.scale), self.transposed))
        return merged

    def of_one(self, e: int, part: int, parts: int) -> Change:
        """The same for one expert's matrix [out / parts, in], of so many that its rows are divided into."""
        a, b = self.pairs[e]
        rows = b.chunk(parts)[part]
        return lambda weight: lowrank.fold(weight, a, rows, self.scale)


def pairs_of(a: Tensor, b: Tensor, rank: int) -> list[tuple[Tensor, Tensor]]:
    """A [experts · r, in] and B [out, r · experts] as a pair per expert."""
    count = len(a) // rank
    by_expert = b.view(len(b), rank, count).permute(2, 0, 1).contiguous()
    return list(zip(a.view(count, rank, -1).unbind(0), by_expert.unbind(0), strict=True))


def stacked(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The inverse of ``pairs_of``."""
    b = torch.stack([b for _, b in pairs], dim=2)
    return torch.cat([a for a, _ in pairs]), b.flatten(1)


def _each(weight: Tensor) -> Tensor:
    """[experts, …] of a parameter that may be a matrix alone."""
    return weight if weight.ndim == 3 else weight[None]


def _as_stored(matrix: Tensor, transposed: bool) -> Tensor:
    return matrix.T if transposed else matrix


class ExpertsLoRA(Adapter):
    """A frozen module of experts with low-rank paths beside some of its parameters.

    Args:
        base: the module.
        updates: by the parameter's name, in the module's order: in PEFT's file the last one is the outermost.
    """

    files = {}  # noqa: RUF012 - ClassVar in the contract

    def __init__(self, base: nn.Module, updates: Mapping[str, ExpertUpdate]) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.updates = nn.ModuleDict(updates)
        self.is_routed = experts.follows_interface(base) and set(updates) <= _MAPS

    def adapter_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """A and B of each parameter."""
        for name, prefix in self._prefixes().items():
            update = self._update(name)
            yield prefix + A, update.lora_a
            yield prefix + B, update.lora_b

    def changes(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Change]:
        """W_e + s B_e A_e of every expert."""
        return {
            name: self._update(name).change(tensors[prefix + A], tensors[prefix + B])
            for name, prefix in self._prefixes().items()
        }

    def parts(self) -> dict[str, ExpertUpdate]:
        """What is beside each parameter, by its name."""
        return {name: self._update(name) for name in self.updates}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the base's."""
        if self.is_routed and len(args) == 3 and not kwargs:
            return self._routed(*args)
        sums = {
            name: update.added_to(experts.dense_parameter(self.base, name)) for name, update in self.parts().items()
        }
        return torch.func.functional_call(self.base, sums, args, kwargs)

    def _routed(self, hidden: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        """Of the experts that got tokens; arguments as ``ops.experts.routed`` takes them."""
        pairs = {name: update.pairs(hidden.dtype) for name, update in self.parts().items()}

        def product(name: str, e: int, x: Tensor) -> Tensor:
            y = experts.product(self.base, name, e, x)
            return y if name not in pairs else y + lowrank.linear(x, *pairs[name][e], self._update(name).scale)

        def one(e: int, x: Tensor) -> Tensor:
            return experts.expert(self.base, e, x, product)

        return experts.routed(hidden, chosen, shares, cast(int, self.base.num_experts), one)

    def _update(self, name: str) -> ExpertUpdate:
        return cast(ExpertUpdate, self.updates[name])

    def _prefixes(self) -> dict[str, str]:
        """What PEFT puts before A and B: it wraps the module once per parameter, the first one innermost."""
        last = len(self.updates) - 1
        return {name: "base_layer." * (last - depth) for depth, name in enumerate(self.updates)}

    def merged_weight(self) -> Tensor:
        """Raises AdapterError: there is more than one; see ``changes``."""
        raise AdapterError("experts have several weights: truetune merge folds each of them")
