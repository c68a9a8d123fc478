"""Settings of ``truetune generate``."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import model_validator
from typing_extensions import Self

from truetune.config.options import option
from truetune.config.quant import QuantGroup


class GenerateConfig(QuantGroup):
    """Settings of ``truetune generate``: answer one prompt with a base, an adapter on it, or a merged model."""

    command: ClassVar[str] = "generate"

    model: str = option(
        help="a local folder, or a name on the Hub", group="base", alias=("model_name_or_path",), min_length=1
    )
    revision: str | None = option(None, help="branch, tag or commit of a Hub model", group="base")
    adapter: str | None = option(None, help="an adapter's folder", group="base", min_length=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("auto", help="precision", group="base")
    device: Literal["auto", "cpu", "cuda"] = option("auto", help="where to compute", group="base")
    allow_other_base: bool = option(
        False, help="go on although the base is not the one the adapter was trained on", group="base"
    )
    prompt: str = option(help="what to answer; - reads it from standard input", group="dataset")
    system: str | None = option(None, help="system message", group="dataset")
    template: str = option(
        "auto",
        help="chat template: auto (the adapter's, else the tokenizer's own), none (continue the bare text), "
        "alpaca, chatml, plain, or a Jinja file",
        group="dataset",
    )
    max_new_tokens: int = option(256, help="longest answer, in tokens", group="training", gt=0)
    temperature: float = option(
        0.0, help="0 takes the likeliest token; above, tokens are drawn", group="training", ge=0
    )
    top_p: float = option(
        1.0, help="draw among the likeliest tokens that make up this share", group="training", gt=0, le=1
    )
    seed: int = option(0, help="seed of the draws", group="training", ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.top_p != 1 and not self.temperature:
            raise ValueError(
                "--top-p needs --temperature above 0: at 0 the likeliest token is taken, and none is drawn"
            )
        if self.system is not None and self.template == "none":
            raise ValueError("--system needs a template to stand in, and --template none continues the bare prompt")
        if self.allow_other_base and not self.adapter:
            raise ValueError("--allow-other-base needs --adapter: without one there is no other base")
        return self
