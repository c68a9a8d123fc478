"""BitFit: the biases are trained, and nothing else.  Ben Zaken et al. 2021, arXiv:2106.10199.

There is nothing to wrap: the biases are parts of the base, so they are frozen, saved and merged as parts are. PEFT has
no such method; the file is laid out as PEFT lays out trained biases.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from truetune.adapters.base import Adapter
from truetune.adapters.methods import Site
from truetune.adapters.parts import has_bias
from truetune.adapters.peft_fields import Fields
from truetune.config.other_methods import BitFit
from truetune.errors import AdapterError

CHANGES_TABLE = False
TRAINS: tuple[str, ...] = ("bias",)


def sites(model: nn.Module, config: BitFit) -> list[str]:
    """None.

    Raises:
        AdapterError: the model has no bias.
    """
    if not has_bias(model):
        raise AdapterError(
            "bitfit trains the biases, and this model has none",
            ("way out", "--method ia3, which trains about as few parameters, or lora"),
        )
    return []


def wrap(layer: nn.Module, config: BitFit, site: Site) -> Adapter:
    """Never called."""
    raise AssertionError(f"bitfit wraps no layer, {site.path} neither")


def to_peft(model: nn.Module, config: BitFit, sites: Sequence[str]) -> dict[str, Any]:
    """Nothing: ``bias`` says it all."""
    return {}


def from_peft(config: Mapping[str, Any], folder: Path) -> BitFit:
    """The settings in our terms; the biases are trained without being named."""
    return Fields(config, folder).build(BitFit).model_copy(update={"trainable": ()})
