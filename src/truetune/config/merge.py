"""Settings of ``truetune merge``."""

from __future__ import annotations

from typing import ClassVar, Literal

from truetune.config.options import option
from truetune.config.quant import QuantGroup


class MergeConfig(QuantGroup):
    """Settings of ``truetune merge``: fold an adapter into its base, tensor by tensor.

    ``--quant`` packs the merged model again.
    """

    command: ClassVar[str] = "merge"

    model: str = option(help="the base the adapter was trained on", group="base", alias=("base_model",), min_length=1)
    revision: str | None = option(None, help="branch, tag or commit of a Hub model", group="base")
    adapter: str = option(help="the adapter's folder", group="base", alias=("adapters",), min_length=1)
    out: str = option(
        help="folder for the merged model; must not exist or be empty",
        group="run",
        alias=("output_dir", "output"),
        min_length=1,
    )
    onto: Literal["auto", "original", "dequantized"] = option(
        "auto",
        help="for an adapter trained on a quantised base: merge onto the original weights, or onto what the quantised "
        "ones stand for, which is what it was trained on; auto: the latter",
        group="run",
    )
    max_shard_gb: float = option(5.0, help="largest weight file, in GB", group="run", gt=0)
    allow_other_base: bool = option(
        False, help="merge although the base's weights are not the ones the adapter was trained on", group="run"
    )
