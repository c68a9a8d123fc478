"""(IA)³: trained factors on what layers put out, or take in.  Liu et al. 2022, arXiv:2205.05638, section 3.3.

    y = l ∘ (W x + b)      keys and values, l [out]
    y = W (l ∘ x) + b      the MLP's second map, whose input is the inner activation; l [in]

A factor starts at one, so an untrained adapter changes nothing. Merged, it scales the rows of W and the bias with them,
or the columns of W.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from truetune.adapters.base import Adapter, Change
from truetune.adapters.ia3_targets import AUTO, check_feedforward, feedforward_names, targets_of_family
from truetune.adapters.linear_sites import check_linear, linear_sites
from truetune.adapters.methods import Site
from truetune.adapters.peft_fields import Fields, excluded, targets_of
from truetune.adapters.projecting import projection_group
from truetune.adapters.targets import matches, shortest_names
from truetune.config.other_methods import IA3
from truetune.ops.frozen import frozen_weight, is_conv1d
from truetune.ops.projection import Projection

CHANGES_TABLE = False
TRAINS: tuple[str, ...] = ()
PEFT_LACKS = ("bias", "ensure_weight_tying")

# How it was started, how PEFT found it: nothing of what a trained adapter computes.
_WITHOUT_EFFECT = ("fan_in_fan_out", "init_ia3_weights")


def scaled(tensor: Tensor, factors: Tensor) -> Tensor:
    """``tensor`` times ``factors``, which broadcast; the product is formed in the wider dtype and rounded once."""
    return (tensor * factors).to(tensor.dtype)


class IA3Linear(Adapter):
    """A frozen linear layer whose output, or input, is scaled by trained factors.

    Args:
        base: the layer; its parameters stop requiring gradients.
        scales_input: the factors are those of the input.
    """

    files = {"factors": "ia3_l"}  # noqa: RUF012 - ClassVar in the contract
    dropout, site, drops_base = 0.0, 0, False  # as ``adapters.projecting.Projecting`` asks for

    def __init__(self, base: nn.Module, *, scales_input: bool) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scales_input = scales_input
        frozen = frozen_weight(base)
        shape = (1, frozen.in_features) if scales_input else (frozen.out_features, 1)  # as PEFT's file has them
        self.factors = nn.Parameter(torch.ones(shape, device=frozen.device))

    def projection(self) -> Projection | None:
        """The layer as part of a node; of one whose input is scaled the base alone: see ``with_inner_factors``."""
        group = projection_group((self.base,), tokens=1)
        if group is None:
            return None
        return group.projections[0] if self.scales_input else _times(group.projections[0], self.factors.flatten())

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in the dtype of the base's output."""
        factors = self.factors.flatten()
        if self.scales_input:
            y: Tensor = self.base(scaled(x, factors))
            return y
        return scaled(self.base(x), factors)

    def changes(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Change]:
        """l ∘ W by columns; or by rows, and l ∘ b."""
        factors, transposed = tensors["ia3_l"], is_conv1d(self.base)
        changes: dict[str, Change] = {"weight": lambda weight: scaled(weight, factors.T if transposed else factors)}
        if self.bias is not None and not self.scales_input:
            changes["bias"] = lambda bias: scaled(bias, factors.flatten())
        return changes

    def merged_weight(self) -> Tensor:
        """W scaled, dense; as [in, out] where the base is a ``Conv1D``."""
        merged = scaled(frozen_weight(self.base).dense().detach(), self.factors.detach())
        return merged.T.contiguous() if is_conv1d(self.base) else merged


def with_inner_factors(down: nn.Module, up: Projection) -> Projection:
    """What makes a gated MLP's inner activations, with the factors that ``down`` has for them.

    W (l ∘ (act(gate) · up)) = W (act(gate) · (l ∘ up)): there they are factors of an output, and cost no pass of their
    own.
    """
    if isinstance(down, IA3Linear) and down.scales_input:
        return _times(up, down.factors.flatten())
    return up


def _times(p: Projection, factors: Tensor) -> Projection:
    """A projection whose whole output is scaled, its bias too."""
    constant = p.constant(factors.dtype)
    magnitude = factors if p.magnitude is None else factors * p.magnitude
    return replace(p, bias=None, magnitude=magnitude, shift=None if constant is None else factors * constant)


def sites(model: nn.Module, config: IA3) -> list[str]:
    """Paths of the layers that the targets name, or that the model's family has.

    Raises:
        AdapterError: no such layers, or a family whose layers have to be named.
    """
    named = config.model_copy(update={"targets": targets_of_family(model)}) if config.targets == AUTO else config
    paths = linear_sites(model, named)
    check_feedforward(config, paths)
    return paths


def wrap(layer: nn.Module, config: IA3, site: Site) -> Adapter:
    """The layer with its factors."""
    check_linear(layer, site.path, config)
    if "feedforward" not in site.shared:  # once, by the layers as the model has them
        site.shared["feedforward"] = feedforward_names(site.model, config)
    return IA3Linear(layer, scales_input=any(matches(name, site.path) for name in site.shared["feedforward"]))


def to_peft(model: nn.Module, config: IA3, sites: Sequence[str]) -> dict[str, Any]:
    """The method's own fields of ``adapter_config.json``; PEFT wants ``feedforward_modules`` among the targets."""
    inner = {path for path, layer in model.named_modules() if isinstance(layer, IA3Linear) and layer.scales_input}
    targets = shortest_names(model, sites)
    names = [name for name in targets if any(matches(name, path) for path in inner)]
    if {path for path in sites if any(matches(name, path) for name in names)} != inner:
        targets, names = sorted(sites), sorted(inner)
    return {
        "target_modules": targets,
        "feedforward_modules": names,
        "fan_in_fan_out": any(is_conv1d(module) for module in model.modules()),
        "init_ia3_weights": True,
    }


def from_peft(config: Mapping[str, Any], folder: Path) -> IA3:
    """The settings in our terms."""
    fields = Fields(config, folder, without_effect=_WITHOUT_EFFECT)
    inner = fields.take("feedforward_modules")
    if inner is None:
        fields.refuse("feedforward_modules")  # PEFT would choose by the architecture
    return fields.build(
        IA3,
        targets=("target_modules", targets_of(fields)),
        exclude=("exclude_modules", excluded(fields)),
        feedforward=("feedforward_modules", (inner,) if isinstance(inner, str) else tuple(inner or ())),
    )
