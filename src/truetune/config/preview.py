"""Settings of ``truetune preview``."""

from __future__ import annotations

import re
from typing import ClassVar

from pydantic import field_validator, model_validator
from typing_extensions import Self

from truetune.config.groups import LengthGroup, ModelGroup, StepGroup
from truetune.config.options import Options, option
from truetune.config.sft import InstructionGroup, SFTConfig, VocabularyGroup

_SPAN = re.compile(r"(\d+)(?:-(\d+))?")


class PreviewConfig(StepGroup, VocabularyGroup, InstructionGroup, LengthGroup, ModelGroup):
    """Settings of ``truetune preview``: show rows as the loss will see them, and figures about all of them."""

    command: ClassVar[str] = "preview"
    passes_over: ClassVar[type[Options] | None] = SFTConfig  # so that a run's own file can be previewed

    rows: str | None = option(
        None, help="rows to show, by the numbers that reports give them (counted from 1): 5,10-12", group="run"
    )
    sample: int | None = option(
        None,
        help="how many rows to show, spread evenly over all of them (default: 3; on a page 200)",
        group="run",
        ge=0,
    )
    worst: bool = option(
        False,
        help="show the rows to look at first: those left out, the longest, the shortest answers, what nearly repeats",
        group="run",
    )
    html: str | None = option(
        None, help="write a page with the rows and all figures to this file", group="run", min_length=1
    )

    @field_validator("rows")
    @classmethod
    def _numbers(cls, value: str | None) -> str | None:
        if value is not None:
            spans_of(value)
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        given = [f"--{name}" for name in ("rows", "sample", "worst") if getattr(self, name) not in (None, False)]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)}: each says which rows to show; keep one of them")
        self.training()
        return self

    def training(self) -> SFTConfig:
        """The settings of ``truetune sft`` that read the same data the same way.

        Raises:
            ConfigError: they exclude each other.
        """
        shared = self.model_fields_set & SFTConfig.model_fields.keys()
        return SFTConfig(**self.model_dump(include=shared))


def spans_of(text: str) -> list[tuple[int, int]]:
    """``5,10-12`` as [(5, 5), (10, 12)].

    Raises:
        ValueError: it is no list of numbers and ranges.
    """
    found = [_SPAN.fullmatch(part.strip()) for part in text.split(",")]
    spans = [(int(match[1]), int(match[2] or match[1])) for match in found if match]
    if len(spans) != len(found) or any(first > last for first, last in spans):
        raise ValueError("numbers and ranges of rows, such as 5,10-12")
    return spans
