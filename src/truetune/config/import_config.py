"""Settings of ``truetune import-config``."""

from __future__ import annotations

from typing import ClassVar, Literal

from truetune.config.options import Options, option


class ImportConfig(Options):
    """Settings of ``truetune import-config FILE``: another program's config as one of ours, key by key."""

    command: ClassVar[str] = "import-config"
    positional: ClassVar[tuple[str, ...]] = ("path",)

    path: str = option(
        help="YAML of LLaMA-Factory, axolotl or torchtune, a script with an ms-swift or TRL command line, or arguments "
        "of PEFT and TRL as YAML or JSON",
        group="run",
        min_length=1,
    )
    out: str | None = option(
        None, help="the YAML file to write (default: it is printed)", group="run", alias=("output",), min_length=1
    )
    source: Literal["auto", "llamafactory", "axolotl", "swift", "torchtune", "trl"] = option(
        "auto", help="whose config it is; auto tells it from the keys", group="run", alias=("from",)
    )
    devices: int | None = option(
        None, help="how many devices it ran on, for the batch size (default: what the file says, else 1)", group="run",
        gt=0,
    )  # fmt: skip
