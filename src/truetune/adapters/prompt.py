"""Prompt tuning: trained embeddings in front of every text.  Lester et al. 2021, arXiv:2104.08691, section 2.

They start as rows of the table: those of a given text, or random ones of the vocabulary, which the paper found to learn
better than random numbers (section 3.2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from truetune.adapters.base import Adapter
from truetune.adapters.methods import Site
from truetune.adapters.peft_fields import Fields
from truetune.adapters.virtual import EMBEDDINGS, TrainedRows, table_path
from truetune.adapters.virtual_fields import SHAPE_FIELDS, shape_fields
from truetune.config.other_methods import Prompt
from truetune.errors import AdapterError

CHANGES_TABLE = False
TRAINS: tuple[str, ...] = ()
PEFT_LACKS = ("bias", "ensure_weight_tying")

# How it was started.
_WITHOUT_EFFECT = (
    *SHAPE_FIELDS, "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs",
)  # fmt: skip


class PromptTable(TrainedRows):
    """An embedding table with trained virtual tokens.

    Args:
        base: the table.
        start: [n, dim], where they start.
    """

    files = {"rows": EMBEDDINGS}  # noqa: RUF012 - ClassVar in the contract

    def __init__(self, base: nn.Module, start: Tensor) -> None:
        super().__init__(base, len(start))
        self.rows = nn.Parameter(start.detach().float().clone())

    def embeddings(self) -> Tensor:
        """[n, dim] float32."""
        return self.rows


def sites(model: nn.Module, config: Prompt) -> list[str]:
    """The path of the embedding table."""
    return [table_path(model)]


def wrap(layer: nn.Module, config: Prompt, site: Site) -> Adapter:
    """The table with its virtual tokens.

    Raises:
        AdapterError: ``prompt_text`` without its ids, which only a tokenizer knows.
    """
    device, ids = torch.as_tensor(layer.weight).device, _start_ids(layer, config, site)
    with torch.no_grad():
        return PromptTable(layer, layer(ids.to(device)))


def _start_ids(layer: nn.Module, config: Prompt, site: Site) -> Tensor:
    """[n] int64: the ids of the text, repeated or cut to n, as PEFT does; else random ones."""
    if config.prompt_text is None:
        rows = len(torch.as_tensor(layer.weight))
        return torch.randint(rows, (config.virtual_tokens,), generator=site.generator("prompt"))
    given = torch.tensor(site.shared.get("prompt_ids", ()), dtype=torch.int64)
    if not len(given):
        raise AdapterError(
            "--prompt-text: no token of it is known here",
            ("way out", "a text that is not empty; from Python, attach(…, prompt_ids=the ids of the text)"),
        )
    return given.repeat(-(-config.virtual_tokens // len(given)))[: config.virtual_tokens]


def to_peft(model: nn.Module, config: Prompt, sites: Sequence[str]) -> dict[str, Any]:
    """The method's own fields of ``adapter_config.json``."""
    return {**shape_fields(model, config.virtual_tokens), "prompt_tuning_init": "RANDOM"}


def from_peft(config: Mapping[str, Any], folder: Path) -> Prompt:
    """The settings in our terms."""
    fields = Fields(config, folder, without_effect=_WITHOUT_EFFECT)
    return fields.build(Prompt, virtual_tokens=("num_virtual_tokens", fields.take("num_virtual_tokens")))
