"""AdaLoRA: the update as an SVD, whose ranks training spends where they matter.  Zhang et al. 2023, arXiv:2303.10512.

    y = W x + b + s B (E ∘ (A x)),    s = alpha / r        (section 3.1)

A [r, in] and B [out, r] start random and are kept close to orthogonal; E [r], the singular values, starts at zero.
While training, ``rank_allocation`` sets those of E to zero that matter least; a rank without its E adds nothing, and in
the end it is left out of the file. r in s stays the rank that a layer started with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from truetune.adapters.base import Adapter, Change, LowRankUpdate
from truetune.adapters.input_dropout import dropped_input
from truetune.adapters.linear_sites import check_linear, linear_sites
from truetune.adapters.methods import Site
from truetune.adapters.peft_fields import Fields, excluded, layers_of, plain_number, targets_of
from truetune.adapters.projecting import projection_group
from truetune.adapters.rank_allocation import BETA, Phases
from truetune.adapters.targets import shortest_names
from truetune.config.lora import AdaLoRA, AdaLoRATrained
from truetune.errors import AdapterError
from truetune.ops import lowrank
from truetune.ops.frozen import frozen_weight, is_conv1d
from truetune.ops.projection import Projection, project

CHANGES_TABLE = False
TRAINS: tuple[str, ...] = ()

# Of LoRA's fields, which PEFT writes here too: how it was started or found; and r, for which init_r stands.
_WITHOUT_EFFECT = (
    "r", "init_lora_weights", "fan_in_fan_out", "megatron_core", "qalora_group_size", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "beta1", "beta2",
)  # fmt: skip
_STD = 0.02  # of the start of A and B, as in the authors' code
_EPS = 1e-5  # PEFT adds it to r in s
_NOMINAL = 1000  # steps to write where those of the run are not known: the phases are shares of them


class AdaLoRALinear(Adapter):
    """A frozen linear layer with a trained SVD beside it.

    Args:
        base: the layer; its parameters stop requiring gradients.
        rank: r, what it starts with.
        alpha: the update is multiplied by alpha / r.
        dropout: applied to the update's input while training.
        kept: for each of the ranks it started with, whether it still has it; None for all.
        generator: draws A and B.
    """

    files = {"lora_a": "lora_A", "lora_b": "lora_B", "lora_e": "lora_E"}  # noqa: RUF012 - ClassVar in the contract
    drops_base = False
    """See ``ops.projection.Group``."""

    def __init__(
        self,
        base: nn.Module,
        *,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        kept: tuple[bool, ...] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.dropout, self.kept = dropout, kept
        self.site = 0  # tells this layer's dropout masks from another's
        self.scale = alpha / (rank + _EPS)
        self.steps: int | None = None  # of the run that trained it
        self.measured: dict[str, Tensor] = {}  # ``rank_allocation``'s, while training
        frozen, ranks = frozen_weight(base), rank if kept is None else sum(kept)
        a = torch.randn(ranks, frozen.in_features, generator=generator) * _STD
        b = torch.randn(frozen.out_features, ranks, generator=generator) * _STD
        self.lora_a, self.lora_b = (nn.Parameter(t.to(frozen.device)) for t in (a, b))
        self.lora_e = nn.Parameter(torch.zeros(ranks, 1, device=frozen.device))

    def update(self, own: Mapping[str, Tensor] | None = None) -> LowRankUpdate | None:
        """E ∘ A, B and their scale."""
        held = dict(self.adapter_parameters()) if own is None else own
        a, b, e = (held[suffix] for suffix in ("lora_A", "lora_B", "lora_E"))
        return LowRankUpdate(a * e, b, self.scale)

    def projection(self) -> Projection | None:
        """The layer as part of a node; None where its base is trained itself, or is of another kind."""
        group = projection_group((self.base,), tokens=1)
        if group is None or not len(self.lora_e):
            return None if group is None else group.projections[0]
        return replace(group.projections[0], a=self.lora_a * self.lora_e, b=self.lora_b, scale=self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in the dtype of the base's output."""
        rows = x.shape[:-1].numel()
        group = projection_group((self,), rows)
        if group is not None and x.dtype == group.dtype and not torch.is_autocast_enabled(x.device.type):
            (out,) = project(group, x.reshape(rows, x.shape[-1]))
            return out.view(*x.shape[:-1], out.shape[1])
        y: Tensor = self.base(x)
        if not len(self.lora_e):
            return y
        read = dropped_input(x, self.dropout, site=self.site, training=self.training)
        return y + lowrank.linear(read, self.lora_a * self.lora_e, self.lora_b, self.scale).to(y.dtype)

    def training_state(self) -> Mapping[str, Tensor]:
        """How much each element has mattered, and which ranks are left."""
        return self.measured

    def settle(self) -> None:
        """Give up the ranks whose E is zero."""
        alive = (self.lora_e.detach() != 0).flatten()
        left = iter(alive.tolist())
        self.kept = tuple(kept and next(left) for kept in self.kept or (True,) * len(alive))
        self.measured = {}
        self.lora_a, self.lora_e = (nn.Parameter(p.detach()[alive]) for p in (self.lora_a, self.lora_e))
        self.lora_b = nn.Parameter(self.lora_b.detach()[:, alive])

    def changes(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Change]:
        """W + s B (E ∘ A)."""
        own = [tensors[suffix] for suffix in ("lora_A", "lora_B", "lora_E")]
        return {"weight": lambda weight: self._folded(weight, *own)}

    def merged_weight(self) -> Tensor:
        """The same, dense; as [in, out] where the base is a ``Conv1D``."""
        dense = frozen_weight(self.base).dense().detach()
        stored = dense.T if is_conv1d(self.base) else dense
        return self._folded(stored, self.lora_a.detach(), self.lora_b.detach(), self.lora_e.detach())

    def _folded(self, weight: Tensor, a: Tensor, b: Tensor, e: Tensor) -> Tensor:
        """Of a weight as the base stores it, to another."""
        transposed = is_conv1d(self.base)
        merged = lowrank.fold(weight.T if transposed else weight, a * e, b, self.scale)
        return merged.T.contiguous() if transposed else merged


def sites(model: nn.Module, config: AdaLoRA) -> list[str]:
    """Paths of the linear layers that the targets name.

    Raises:
        AdapterError: also for ranks or phases that contradict each other.
    """
    if config.target_rank > config.rank:
        raise AdapterError(
            f"--target-rank {config.target_rank}: layers start with --rank {config.rank}, and only lose ranks",
            ("way out", f"--rank {config.target_rank * 3 // 2}, half as much again, as is usual"),
        )
    if config.prune_from >= config.prune_until:
        raise AdapterError(
            f"--prune-from {config.prune_from:g}: expected less than --prune-until, which is {config.prune_until:g}"
        )
    return linear_sites(model, config)


def wrap(layer: nn.Module, config: AdaLoRA, site: Site) -> Adapter:
    """The layer with its adapter."""
    check_linear(layer, site.path, config)
    adapter = AdaLoRALinear(
        layer,
        rank=config.rank,
        alpha=config.alpha,
        dropout=config.dropout,
        kept=config.trained.kept.get(site.path),
        generator=site.generator("adalora"),
    )
    adapter.site, adapter.steps = site.mask, config.trained.steps
    return adapter


def to_peft(model: nn.Module, config: AdaLoRA, sites: Sequence[str]) -> dict[str, Any]:
    """The method's own fields of ``adapter_config.json``; ``rank_pattern`` says which ranks are left."""
    layers = {path: layer for path in sites if isinstance(layer := model.get_submodule(path), AdaLoRALinear)}
    steps = next((layer.steps for layer in layers.values() if layer.steps), _NOMINAL)
    phases = Phases.of(config, steps)
    return {
        "init_r": config.rank,
        "target_r": config.target_rank,
        "tinit": phases.first,
        "tfinal": steps - phases.last,
        "total_step": steps,
        "deltaT": config.prune_every,
        "beta1": BETA,
        "beta2": BETA,
        "orth_reg_weight": config.orthogonality,
        "rank_pattern": {f"{path}.lora_E": layer.kept for path, layer in layers.items() if layer.kept} or None,
        "lora_alpha": plain_number(config.alpha),
        "lora_dropout": config.dropout,
        "target_modules": shortest_names(model, sites),
        "fan_in_fan_out": any(is_conv1d(module) for module in model.modules()),
        "init_lora_weights": True,
    }


def from_peft(config: Mapping[str, Any], folder: Path) -> AdaLoRA:
    """The settings in our terms, and what training left."""
    fields = Fields(config, folder, without_effect=_WITHOUT_EFFECT)
    steps = fields.take("total_step") or None
    first, after, total = fields.take("tinit") or 0, fields.take("tfinal") or 0, steps or 1
    pattern = fields.take("rank_pattern") or {}
    built = fields.build(
        AdaLoRA,
        rank=("init_r", fields.take("init_r", 12)),  # PEFT's own defaults, for a file that leaves them out
        target_rank=("target_r", fields.take("target_r", 8)),
        alpha=("lora_alpha", fields.take("lora_alpha", 8)),
        dropout=("lora_dropout", fields.take("lora_dropout") or 0.0),
        prune_from=("tinit", first / total),
        prune_until=("tfinal", (total - after) / total),
        prune_every=("deltaT", fields.take("deltaT", 1)),
        orthogonality=("orth_reg_weight", fields.take("orth_reg_weight", 0.5)),
        targets=("target_modules", targets_of(fields)),
        exclude=("exclude_modules", excluded(fields)),
        layers=("layers_to_transform", layers_of(fields)),
    )
    kept = {name.removesuffix(".lora_E"): tuple(map(bool, ranks)) for name, ranks in pattern.items()}
    return built.after(AdaLoRATrained(steps, kept))
