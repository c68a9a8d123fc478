"""Prefix tuning: trained keys and values in front of every layer's own.  Li & Liang 2021, arXiv:2101.00190, section 4.

Virtual tokens take positions 0 … n - 1, and in each layer the trained rows stand for what its maps make of them; their
hidden states are computed along and nobody reads them. PEFT's file holds keys as they are after the rotation by their
position, so what stands in for the map's output is turned back by the same angle (``adapters.rotary``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from truetune.adapters.attention_layout import AttentionLayout, attention_layouts
from truetune.adapters.base import Adapter
from truetune.adapters.methods import Site
from truetune.adapters.peft_fields import Fields
from truetune.adapters.prefix_linear import PrefixLinear, Slot
from truetune.adapters.prompt_encoder import PrefixEncoder, started
from truetune.adapters.rotary import rotary_of, tables, turned_back
from truetune.adapters.virtual import EMBEDDINGS, Places, VirtualTable, publish, table_path
from truetune.adapters.virtual_fields import SHAPE_FIELDS, shape_fields
from truetune.config.other_methods import Prefix
from truetune.errors import AdapterError
from truetune.ops.frozen import frozen_weight

CHANGES_TABLE = False
TRAINS: tuple[str, ...] = ()
PEFT_LACKS = ("bias", "ensure_weight_tying")

# The network that made the rows is no part of the file, nor is how they were started.
_WITHOUT_EFFECT = (*SHAPE_FIELDS, "encoder_hidden_size", "prefix_projection", "init_weights")
_START = 0.02  # rows that start small take attention from a text's own values, and put next to nothing in their place


class PrefixTable(VirtualTable):
    """An embedding table that brings a prefix with its virtual tokens; it owns the rows of all layers.

    Args:
        base: the table.
        layouts: one per layer, all with keys of the same width.
        rows: [n, 2 · layers · width], keys and values of a layer one after the other; or the network that makes them.
        rotary: what turns the keys, and the dtype that it turns them in; None where nothing does.
    """

    files = {"rows": EMBEDDINGS}  # noqa: RUF012 - ClassVar in the contract

    def __init__(
        self,
        base: nn.Module,
        layouts: Sequence[AttentionLayout],
        rows: Tensor | PrefixEncoder,
        rotary: tuple[nn.Module, torch.dtype] | None,
    ) -> None:
        super().__init__(base, rows.embedding.num_embeddings if isinstance(rows, PrefixEncoder) else len(rows))
        self.encoder = rows if isinstance(rows, PrefixEncoder) else None
        self.rows = None if isinstance(rows, PrefixEncoder) else nn.Parameter(rows)
        self.heads, self.width = layouts[0].kv_heads, layouts[0].kv_width
        self._shape = (self.count, len(layouts), 2, self.heads, layouts[0].head_dim)
        self._rotary = rotary  # in a tuple: a module attribute would register the model's own a second time

    def whole(self) -> Tensor:
        """[n, 2 · layers · width] float32, as the file has it."""
        rows: Tensor | None = self.encoder() if self.encoder is not None else self.rows
        assert rows is not None
        return rows

    def slots(self) -> tuple[Tensor, ...]:
        """[n, width] each: what the maps would have to put out, keys and values of a layer one after the other."""
        keys, values = self.whole().view(self._shape).unbind(2)
        if self._rotary is not None:
            rotary, dtype = self._rotary
            cos, sin = (t[:, None, None] for t in tables(rotary, self.count, dtype, keys.device))
            keys = turned_back(keys, cos, sin)
        return tuple(torch.stack([keys, values], dim=2).flatten(1, 2).flatten(2).unbind(1))

    def put(self, rows: Tensor, places: Places) -> Tensor:
        """The table's rows as they are; the layers find theirs by ``places``."""
        publish(replace(places, rows=self.slots()))
        return rows

    def adapter_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """The rows, unless a network makes them."""
        return iter(()) if self.rows is None else super().adapter_parameters()

    def makers(self) -> Iterator[tuple[str, Parameter]]:
        """The network's, where there is one."""
        if self.encoder is not None:
            for name, parameter in self.encoder.named_parameters():
                yield f"prompt_encoder.{name}", parameter

    def training_state(self) -> Mapping[str, Tensor]:
        """The network's, where there is one."""
        return {name: parameter.detach() for name, parameter in self.makers()}

    def shared_tensors(self) -> Mapping[str, Tensor]:
        """What the network makes, where there is one."""
        if self.encoder is None:
            return {}
        with torch.no_grad():
            return {EMBEDDINGS: self.whole()}


def sites(model: nn.Module, config: Prefix) -> list[str]:
    """Paths of the table, which owns the prefix, and of the maps that make keys and values.

    Raises:
        AdapterError: an attention that a prefix can't be given to exactly.
    """
    layouts = attention_layouts(model, config.kind)
    if len({(layout.kv_heads, layout.head_dim) for layout in layouts}) > 1:
        raise AdapterError("--method prefix: this model's layers have keys of several widths", _OTHERWISE)
    for layout in layouts:
        rotary_of(model, model.get_submodule(layout.path), config.kind)
    maps = (part.path for layout in layouts for part in (layout.key, layout.value))
    return [table_path(model), *dict.fromkeys(maps)]


_OTHERWISE = ("way out", "--method prompt")


def wrap(layer: nn.Module, config: Prefix, site: Site) -> Adapter:
    """The table with the prefix, or a map that puts it out."""
    if "layouts" not in site.shared:  # by the table, which comes first: the maps are all as the model has them
        site.shared["layouts"] = attention_layouts(site.model, config.kind)
        return _table(layer, config, site)
    slots = []
    for number, layout in enumerate(site.shared["layouts"]):
        for offset, part in enumerate((layout.key, layout.value)):
            if part.path == site.path:
                slots.append(Slot(2 * number + offset, part.columns))
    return PrefixLinear(layer, slots)


def _table(layer: nn.Module, config: Prefix, site: Site) -> PrefixTable:
    layouts: list[AttentionLayout] = site.shared["layouts"]
    first = layouts[0]
    rotary = rotary_of(site.model, site.model.get_submodule(first.path), config.kind)
    frozen = frozen_weight(site.model.get_submodule(first.key.path))
    turning = None if rotary is None else (rotary, frozen.dtype)
    count, width = config.virtual_tokens, first.kv_width
    out = 2 * len(layouts) * width
    if not config.projection:
        rows = torch.randn(count, out, generator=site.generator("prefix")) * _START
        return PrefixTable(layer, layouts, rows.to(frozen.device), turning)
    make = partial(PrefixEncoder, count, width, config.encoder_hidden or width, out)
    encoder = started(make, site.seed, "prefix", site.path, device=frozen.device)
    assert isinstance(encoder, PrefixEncoder)
    return PrefixTable(layer, layouts, encoder, turning)


def to_peft(model: nn.Module, config: Prefix, sites: Sequence[str]) -> dict[str, Any]:
    """The method's own fields of ``adapter_config.json``: the file holds the rows, whatever made them."""
    table = next(module for module in model.modules() if isinstance(module, PrefixTable))
    return {
        **shape_fields(model, config.virtual_tokens, width=table.width, heads=table.heads),
        "prefix_projection": False,
        "encoder_hidden_size": config.encoder_hidden or table.width,
    }


def from_peft(config: Mapping[str, Any], folder: Path) -> Prefix:
    """The settings in our terms."""
    fields = Fields(config, folder, without_effect=_WITHOUT_EFFECT)
    return fields.build(Prefix, virtual_tokens=("num_virtual_tokens", fields.take("num_virtual_tokens")))
