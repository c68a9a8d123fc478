"""DoRA: a low-rank update of each row's direction, and its magnitude trained apart.

    y = m / |W + s B A| ∘ (W x + s B A x) + b       (Liu et al. 2024, arXiv:2402.09353, equation 5)

The norm is that of each row, taken as a constant of a step: it gets no gradient (section 4.3), and is formed anew only
when A or B has changed. m starts at it, so an untrained adapter changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import Parameter

from truetune.adapters import lora_sites
from truetune.adapters.base import Adapter
from truetune.adapters.lora import LoRALinear, LoRAParams
from truetune.adapters.lora_conv import CONVOLUTIONS, LoRAConv
from truetune.adapters.lora_embedding import LoRAEmbedding
from truetune.adapters.lora_patterns import at_layer
from truetune.adapters.methods import Site
from truetune.adapters.peft_fields import Fields
from truetune.adapters.row_norm import RowNorm, rescaled
from truetune.adapters.targets import output_head
from truetune.config.lora import DoRA, LoRA
from truetune.errors import AdapterError
from truetune.ops import lowrank
from truetune.ops.frozen import frozen_weight

CHANGES_TABLE = False  # the table's magnitudes are of its columns, a head's of its rows: no one matrix has both
TRAINS: tuple[str, ...] = ()

M = "lora_magnitude_vector"


class DoRALinear(LoRALinear):
    """``LoRALinear`` with a trained magnitude for every output. Arguments as there.

    Args:
        drops_base: dropout drops the input of W too, where a magnitude that is not the norm adds to W x: PEFT's way.
    """

    files = {**LoRALinear.files, "lora_magnitude": M}  # noqa: RUF012 - ClassVar in the contract
    settings: ClassVar[type[LoRA]] = DoRA

    def __init__(self, base: nn.Module, *, rank: int, drops_base: bool = True, **settings: Any) -> None:
        super().__init__(base, rank=rank, **settings)
        self.drops_base = drops_base
        self.norm = RowNorm()
        self.lora_magnitude = Parameter(self._norm().clone())

    def update(self, own: Mapping[str, Tensor] | None = None) -> None:
        """None: a magnitude is of the whole weight."""

    def magnitude(self) -> Tensor:
        """[out]: m / |W + s B A|."""
        return self.norm.ratio(self.lora_magnitude, self._norm())

    @classmethod
    def keywords(cls, config: Any) -> dict[str, Any]:
        """The arguments that come from the settings of a run."""
        if config.lora_bias:
            raise AdapterError("--lora-bias: no setting of DoRA")
        return {**super().keywords(config), "drops_base": config.dora_dropout == "compatible"}

    def _norm(self) -> Tensor:
        weight = frozen_weight(self.base)
        return self.norm.of(weight.dense, self.base, (self.lora_a, self.lora_b), self.low_rank, self.scale)

    def _beside(self, x: Tensor, y: Tensor) -> Tensor:
        """See ``LoRALinear``; W x is what the base adds to its bias."""
        low = self._dropped(x)
        update = lowrank.linear(low, *self.low_rank(), self.scale)
        of_base: Tensor = y if low is x or not self.drops_base else self.base(low)
        of_base = of_base if self.bias is None else of_base - self.bias
        magnitude = self.magnitude()
        return y + (magnitude - 1) * of_base + magnitude * update.to(y.dtype)

    def folded(self, weight: Tensor, params: LoRAParams, own: Mapping[str, Tensor]) -> Tensor:
        """The merged weight, [out, in], rounded once."""
        return rescaled(weight, params.a, params.b, params.scale, own[M])


class DoRAEmbedding(LoRAEmbedding):
    """``LoRAEmbedding`` with a trained magnitude for every dimension, as PEFT has it: the columns of the table."""

    files = {**LoRAEmbedding.files, "lora_magnitude": M}  # noqa: RUF012 - ClassVar in the contract
    settings: ClassVar[type[LoRA]] = DoRA

    def __init__(self, base: nn.Embedding, **settings: Any) -> None:
        super().__init__(base, **settings)
        self.norm = RowNorm()
        self.lora_magnitude = Parameter(self._norm().clone())

    def update(self, own: Mapping[str, Tensor] | None = None) -> None:
        """None: a magnitude is of the whole weight."""

    def magnitude(self) -> Tensor:
        """[dim]: m / |Wᵀ + s B A|."""
        return self.norm.ratio(self.lora_magnitude, self._norm())

    def _norm(self) -> Tensor:
        pair = self.lora_a, self.lora_b
        return self.norm.of(lambda: self.base.weight.T, self.base, pair, lambda: pair, self.scale)

    def folded(self, weight: Tensor, params: LoRAParams, own: Mapping[str, Tensor]) -> Tensor:
        """The merged table, [vocab, dim], rounded once."""
        return rescaled(weight.T, params.a, params.b, params.scale, own[M]).T.contiguous()


class DoRAConv(LoRAConv):
    """``LoRAConv`` with a trained magnitude for every output channel, [1, out, 1…] as in PEFT's file."""

    files = {**LoRAConv.files, "lora_magnitude": M}  # noqa: RUF012 - ClassVar in the contract
    settings: ClassVar[type[LoRA]] = DoRA

    def __init__(self, base: nn.Conv1d | nn.Conv2d | nn.Conv3d, *, drops_base: bool = True, **settings: Any) -> None:
        super().__init__(base, **settings)
        self.drops_base = drops_base
        self.norm = RowNorm()
        self.lora_magnitude = Parameter(self._norm().clone().view(1, -1, *(1 for _ in base.kernel_size)))

    @classmethod
    def keywords(cls, config: Any) -> dict[str, Any]:
        """The arguments that come from the settings of a run."""
        return {**super().keywords(config), "drops_base": config.dora_dropout == "compatible"}

    def update(self, own: Mapping[str, Tensor] | None = None) -> None:
        """None: a magnitude is of the whole weight."""

    def _norm(self) -> Tensor:
        pair = self.lora_a, self.lora_b
        flat = self.lora_a.flatten(1), self.lora_b.flatten(1)
        return self.norm.of(lambda: self.base.weight.flatten(1), self.base, pair, lambda: flat, self.scale)

    def _beside(self, x: Tensor, y: Tensor) -> Tensor:
        low = self._dropped(x)
        of_base: Tensor = y if low is x or not self.drops_base else self.base(low)
        across = (-1, *(1 for _ in self.base.kernel_size))
        of_base = of_base if self.bias is None else of_base - self.bias.view(across)
        magnitude = self.norm.ratio(self.lora_magnitude.flatten(), self._norm()).view(across)
        return y + (magnitude - 1) * of_base + magnitude * self._update(low)

    def folded(self, weight: Tensor, params: LoRAParams, own: Mapping[str, Tensor]) -> Tensor:
        """The merged kernel as a matrix, [out, in · k…], rounded once."""
        return rescaled(weight, params.a, params.b, params.scale, own[M].flatten())


def sites(model: nn.Module, config: DoRA) -> list[str]:
    """Paths of the layers that the targets name.

    Raises:
        AdapterError: as ``lora_sites.sites``; or a setting that DoRA has no meaning for, or a table tied to the head.
    """
    if config.slices or config.lora_bias:
        flag = "--slices" if config.slices else "--lora-bias"
        raise AdapterError(f"{flag}: no setting of --method dora", ("way out", "--method lora"))
    paths = lora_sites.sites(model, config)
    get = getattr(model, "get_input_embeddings", None)
    table, head = get() if get else None, output_head(model)
    if table is not None and head is not None and head.weight is table.weight:
        for path in paths:
            if model.get_submodule(path) in (table, head):
                raise AdapterError(
                    f"--targets: {path}: the head is the embedding table, and DoRA would scale its rows as the one and "
                    "its columns as the other",
                    ("way out", "leave it out, or --method lora"),
                )
    return paths


def wrap(layer: nn.Module, config: DoRA, site: Site) -> Adapter:
    """The layer with its adapter."""
    own, draw = at_layer(config, site.path), site.generator("lora")
    if isinstance(layer, nn.Embedding):
        return DoRAEmbedding.from_base(layer, own, generator=draw)
    adapter: DoRALinear | DoRAConv
    if isinstance(layer, CONVOLUTIONS):
        adapter = DoRAConv.from_base(layer, own, generator=draw)
    else:
        adapter = DoRALinear.from_base(layer, own, generator=draw, **lora_sites.starting(layer, own, site))
    adapter.site = site.mask
    return adapter


def to_peft(model: nn.Module, config: DoRA, sites: Sequence[str]) -> dict[str, Any]:
    """The method's own fields of ``adapter_config.json``."""
    return {**lora_sites.to_peft(model, config, sites), "use_dora": True}


def from_peft(config: Mapping[str, Any], folder: Path) -> DoRA:
    """The settings in our terms."""
    fields = Fields(config, folder, without_effect=lora_sites.WITHOUT_EFFECT)
    fields.take("use_dora")
    unknown = [name for name in ("lora_bias", "slices", "enable_lora") if config.get(name)]
    if config.get("ensure_weight_tying") and not config.get("modules_to_save"):
        unknown.append("ensure_weight_tying")
    for name in unknown:
        fields.refuse(name)
    return lora_sites.settings_of(DoRA, fields)
