"""P-tuning: embeddings in front of every text, made by a small network while training.  Liu et al. 2021,
arXiv:2103.10385, section 3. What an adapter's file holds is what the network made, as in PEFT's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from truetune.adapters.base import Adapter
from truetune.adapters.methods import Site
from truetune.adapters.peft_fields import Fields
from truetune.adapters.prompt import PromptTable
from truetune.adapters.prompt_encoder import LSTMEncoder, MLPEncoder, started
from truetune.adapters.virtual import EMBEDDINGS, TrainedRows, table_path, width_of
from truetune.adapters.virtual_fields import SHAPE_FIELDS, shape_fields
from truetune.config.other_methods import PTuning

CHANGES_TABLE = False
TRAINS: tuple[str, ...] = ()
PEFT_LACKS = ("bias", "ensure_weight_tying")

# The network that made the rows is no part of the file.
_WITHOUT_EFFECT = (
    *SHAPE_FIELDS, "encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout",
)  # fmt: skip


class EncodedTable(TrainedRows):
    """An embedding table whose virtual tokens a network makes.

    Args:
        base: the table.
        encoder: gives [count, dim].
    """

    files = {}  # noqa: RUF012 - ClassVar in the contract

    def __init__(self, base: nn.Module, encoder: nn.Module, count: int) -> None:
        super().__init__(base, count)
        self.encoder = encoder

    def embeddings(self) -> Tensor:
        """[n, dim] float32."""
        rows: Tensor = self.encoder()
        return rows

    def makers(self) -> Iterator[tuple[str, Parameter]]:
        """The network's."""
        for name, parameter in self.encoder.named_parameters():
            yield f"prompt_encoder.{name}", parameter

    def training_state(self) -> Mapping[str, Tensor]:
        """The network's."""
        return {name: parameter.detach() for name, parameter in self.makers()}

    def shared_tensors(self) -> Mapping[str, Tensor]:
        """What it makes."""
        with torch.no_grad():
            return {EMBEDDINGS: self.embeddings()}


def sites(model: nn.Module, config: PTuning) -> list[str]:
    """The path of the embedding table."""
    return [table_path(model)]


def wrap(layer: nn.Module, config: PTuning, site: Site) -> Adapter:
    """The table with its virtual tokens, and the network that makes them."""
    count, width, device = config.virtual_tokens, width_of(layer), torch.as_tensor(layer.weight).device
    if config.encoder == "none":
        return PromptTable(layer, torch.randn(count, width, generator=site.generator("ptuning")).to(device))
    kind = MLPEncoder if config.encoder == "mlp" else LSTMEncoder
    make = partial(kind, count, width, config.encoder_hidden or width)
    return EncodedTable(layer, started(make, site.seed, "ptuning", site.path, device=device), count)


def to_peft(model: nn.Module, config: PTuning, sites: Sequence[str]) -> dict[str, Any]:
    """The method's own fields of ``adapter_config.json``."""
    shape = shape_fields(model, config.virtual_tokens)
    return {
        **shape,
        "encoder_reparameterization_type": "LSTM" if config.encoder == "lstm" else "MLP",
        "encoder_hidden_size": config.encoder_hidden or shape["token_dim"],
        "encoder_num_layers": 2,
        "encoder_dropout": 0.0,
    }


def from_peft(config: Mapping[str, Any], folder: Path) -> PTuning:
    """The settings in our terms."""
    fields = Fields(config, folder, without_effect=_WITHOUT_EFFECT)
    return fields.build(
        PTuning,
        virtual_tokens=("num_virtual_tokens", fields.take("num_virtual_tokens")),
        encoder=("encoder_reparameterization_type", "none"),
    )
