"""Settings of ``truetune demo``."""

from __future__ import annotations

from typing import ClassVar

from truetune.config.options import Options, option


class DemoConfig(Options):
    """Settings of ``truetune demo``: fine-tune the embedded base on the standard library, offline."""

    command: ClassVar[str] = "demo"

    out: str = option("truetune-demo", help="folder for the run and the merged model", group="run")
    steps: int = option(120, help="optimizer steps", group="training", gt=0)
    answers: int = option(48, help="held-out questions that both models answer", group="training", gt=0)
    seed: int = option(0, help="seed of the run", group="training", ge=0)
