"""Settings of ``truetune quantize``."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import model_validator
from typing_extensions import Self

from truetune.config.options import option
from truetune.config.quant import QuantGroup


class QuantizeConfig(QuantGroup):
    """Settings of ``truetune quantize MODEL OUT``: write a base with packed weights, in bitsandbytes' format."""

    command: ClassVar[str] = "quantize"
    positional: ClassVar[tuple[str, ...]] = ("path", "out")

    path: str = option(help="the model: a local folder, or a name on the Hub", group="base", min_length=1)
    out: str = option(help="folder for the quantised model; must not exist or be empty", group="run", min_length=1)
    revision: str | None = option(None, help="branch, tag or commit of a Hub model", group="base")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", help="precision of what stays dense; auto keeps the checkpoint's", group="base"
    )
    max_shard_gb: float = option(5.0, help="largest weight file, in GB", group="run", gt=0)

    @model_validator(mode="after")
    def _something(self) -> Self:
        if self.quant == "none":
            raise ValueError("--quant: say what to quantise to: int8, nf4 or fp4")
        return self
