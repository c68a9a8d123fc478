"""Bottleneck adapters: small networks after, or beside, a layer's parts.  Houlsby et al. 2019, arXiv:1902.00751.

    y = f(x) + s · (U a(D f(x) + d) + u)    after a part f, before the residual sum
    y = f(x) + s · (U a(D x + d) + u)       beside it (He et al. 2022, arXiv:2110.04366, section 4)

``houlsby`` is after attention and MLP, ``pfeiffer`` (Pfeiffer et al. 2021, arXiv:2005.00247) after the MLP alone,
``parallel`` beside the MLP. With ``--adapter-reads stream`` D reads f(x) + h, or beside the MLP h, where h is the
residual stream that the part's result is added to: the sequential and parallel bottlenecks of AdapterHub. U and u start
at zero, so an untrained adapter changes nothing. PEFT has no such method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from truetune.adapters.attention_layout import AttentionLayout, attention_layouts
from truetune.adapters.base import Adapter
from truetune.adapters.methods import Site
from truetune.adapters.peft_fields import Fields
from truetune.adapters.stream_tap import StreamTap, is_norm, stream_norms, tap_before, tap_of
from truetune.config.other_methods import Bottleneck
from truetune.errors import AdapterError
from truetune.ops.frozen import frozen_weight, is_linear

CHANGES_TABLE = False
TRAINS: tuple[str, ...] = ()
PEFT_LACKS = ("ensure_weight_tying",)

_ENDS = ("down_proj", "c_proj", "dense_4h_to_h", "fc2")  # what an MLP's last map is called
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}
_START = 0.02  # standard deviation of D


class BottleneckAdapter(Adapter):
    """A frozen part with a small network after it, or beside it.

    Args:
        base: a linear map, or a whole MLP whose first argument is [..., width] and whose result has that shape.
        width: of the stream that it writes to.
        config: how narrow, which activation, which factor; and whether it is beside.
        tap: where the residual stream is read, if it is.
    """

    files = {  # noqa: RUF012 - ClassVar in the contract
        "down": "adapter_down.weight", "down_bias": "adapter_down.bias",
        "up": "adapter_up.weight", "up_bias": "adapter_up.bias",
    }  # fmt: skip

    def __init__(
        self,
        base: nn.Module,
        width: int,
        config: Bottleneck,
        *,
        device: torch.device,
        generator: torch.Generator,
        tap: StreamTap | None = None,
    ) -> None:
        super().__init__()
        self._tap = (tap,)  # no submodule of this one
        self.base = base.requires_grad_(False)
        self.scale, self.is_beside = config.adapter_scale, config.placement == "parallel"
        self.activation = _ACTIVATIONS[config.activation]
        inner = max(1, int(width // config.reduction))
        self.down = nn.Parameter((torch.randn(inner, width, generator=generator) * _START).to(device))
        self.down_bias = nn.Parameter(torch.zeros(inner, device=device))
        self.up = nn.Parameter(torch.zeros(width, inner, device=device))
        self.up_bias = nn.Parameter(torch.zeros(width, device=device))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., in] -> [..., width], in the dtype of the base's output."""
        y, seen = self.observed(x, *args, **kwargs)
        return y + self.added(seen).to(y.dtype)

    def observed(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """See ``adapters.summed.Adding``."""
        y: Tensor = self.base(x, *args, **kwargs)
        return y, (x, y)

    def added(self, seen: tuple[Tensor, Tensor]) -> Tensor:
        """[..., width], of the part's input and its output."""
        read = self._read(*seen)
        inner = self.activation(F.linear(read, self.down.to(read.dtype), self.down_bias.to(read.dtype)))
        return F.linear(inner, self.up.to(read.dtype), self.up_bias.to(read.dtype)) * self.scale

    def _read(self, x: Tensor, y: Tensor) -> Tensor:
        """[..., width], what D is applied to."""
        (tap,) = self._tap
        if tap is None:
            return x if self.is_beside else y
        stream = tap.taken().view_as(y)
        return stream if self.is_beside else y + stream

    def merged_weight(self) -> Tensor:
        """Raises AdapterError: there is a bend in it."""
        raise AdapterError("a bottleneck adapter does not fold into weights: serve it beside the base")


def sites(model: nn.Module, config: Bottleneck) -> list[str]:
    """Paths of the maps that end a sublayer, or of the MLPs.

    Raises:
        AdapterError: they are not found in this family.
    """
    paths, norms = list[str](), list[str]()
    for layout in attention_layouts(model, config.kind):
        norms += stream_norms(model, _layer_of(layout), config) if config.adapter_reads == "stream" else ()
        if config.placement == "houlsby":
            paths.append(layout.output)
        paths.append(mlp_site(model, layout, config))
    return [*norms, *paths]


def mlp_site(model: nn.Module, layout: AttentionLayout, config: Bottleneck) -> str:
    """Path of the map that ends a layer's MLP, or with ``parallel`` of the MLP.

    Raises:
        AdapterError: it is not found in this family.
    """
    end = _mlp_end(model, layout)
    if config.placement != "parallel":
        return end
    mlp = end.rpartition(".")[0]
    if mlp == _layer_of(layout):
        raise _unknown(model, "its MLP is no module of its own", "--placement pfeiffer")
    return mlp


def _layer_of(layout: AttentionLayout) -> str:
    return layout.path.rpartition(".")[0]


def _mlp_end(model: nn.Module, layout: AttentionLayout) -> str:
    """The one map outside the attention that is called like the end of an MLP."""
    layer = _layer_of(layout)
    found = [
        f"{layer}.{path}"
        for path, module in model.get_submodule(layer).named_modules()
        if path.rpartition(".")[2] in _ENDS and is_linear(module)
    ]
    found = [path for path in found if not path.startswith(f"{layout.path}.")]
    if len(found) != 1:
        raise _unknown(model, f"{len(found)} maps of a layer look like the end of its MLP", "--method lora")
    if getattr(model.config, "slow_but_exact", False):
        raise _unknown(model, "with slow_but_exact it computes past its layers", "slow_but_exact false in config.json")
    return found[0]


def _unknown(model: nn.Module, why: str, way_out: str) -> AdapterError:
    kind = getattr(model.config, "model_type", "this model")
    return AdapterError(f"--method bottleneck: {kind} is not built in a way that is known here: {why}",
                        ("way out", way_out))  # fmt: skip


def wrap(layer: nn.Module, config: Bottleneck, site: Site) -> Adapter:
    """The part with its network, or the norm where it reads the stream."""
    if config.adapter_reads == "stream" and is_norm(site.path):
        return tap_of(layer, site.path, site.shared)
    text: Any = site.model.config.get_text_config()  # type: ignore[operator, union-attr]
    width = int(text.hidden_size)
    maps = [module for module in layer.modules() if is_linear(module)]
    device = frozen_weight(maps[0]).device
    draws = site.generator("bottleneck")
    tap = tap_before(site.path, site.shared) if config.adapter_reads == "stream" else None
    return BottleneckAdapter(layer, width, config, device=device, generator=draws, tap=tap)


def to_peft(model: nn.Module, config: Bottleneck, sites: Sequence[str]) -> dict[str, Any]:
    """The method's own fields of ``adapter_config.json``."""
    return {
        "placement": config.placement,
        "reduction_factor": config.reduction,
        "activation": config.activation,
        "adapter_scale": config.adapter_scale,
        **({"adapter_reads": "stream"} if config.adapter_reads == "stream" else {}),
    }


def from_peft(config: Mapping[str, Any], folder: Path) -> Bottleneck:
    """The settings as ``to_peft`` wrote them."""
    fields = Fields(config, folder)
    return fields.build(
        Bottleneck,
        placement=("placement", fields.take("placement")),
        reduction=("reduction_factor", fields.take("reduction_factor")),
        activation=("activation", fields.take("activation")),
        adapter_scale=("adapter_scale", fields.take("adapter_scale")),
        adapter_reads=("adapter_reads", fields.take("adapter_reads", "part")),
    )
