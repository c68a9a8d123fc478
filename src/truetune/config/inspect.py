"""Settings of ``truetune inspect``."""

from __future__ import annotations

from typing import ClassVar

from pydantic import model_validator
from typing_extensions import Self

from truetune.config.groups import FormatName
from truetune.config.options import Options, option


class InspectConfig(Options):
    """Settings of ``truetune inspect``: say what a model, adapter, checkpoint, run, GGUF or data file is."""

    command: ClassVar[str] = "inspect"
    positional: ClassVar[tuple[str, ...]] = ("path",)

    path: str | None = option(None, help="a folder or file", group="run", min_length=1)
    format: FormatName = option(
        "auto", help="form of the rows of a data file; auto tells it from the columns", group="run"
    )
    columns: tuple[str, ...] = option(
        (), help="which column of a data file holds which field, as in instruction=question output=answer", group="run"
    )
    methods: bool = option(False, help="list the tuning methods and what each can do instead", group="run")
    diff: tuple[str, ...] = option(
        (),
        help="two of a kind instead, A B: what differs between two runs, checkpoints, adapters, models or data files",
        group="run",
    )

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.path is not None) + self.methods + bool(self.diff) != 1:
            raise ValueError("a folder or file to look at, or --methods, or --diff A B; one of the three")
        if self.diff and len(self.diff) != 2:
            raise ValueError(f"--diff: found {len(self.diff)} of them, expected two folders or files")
        return self
