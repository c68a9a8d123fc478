"""Settings of ``truetune inspect``."""

from __future__ import annotations

from typing import ClassVar

from truetune.config.options import Options, option


class InspectConfig(Options):
    """Settings of ``truetune inspect``: say what a model, adapter, checkpoint, run or data file is."""

    command: ClassVar[str] = "inspect"
    positional: ClassVar[tuple[str, ...]] = ("path",)

    path: str = option(help="a folder or file", group="run", min_length=1)
