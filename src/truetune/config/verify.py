"""Settings of ``truetune verify``."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import field_validator, model_validator
from typing_extensions import Self

from truetune.config.mismatch import MismatchGroup
from truetune.config.options import option
from truetune.errors import nearest

PEERS = ("transformers", "peft", "llama.cpp")


class VerifyConfig(MismatchGroup):
    """Settings of ``truetune verify``: prove that what was trained is what is served."""

    command: ClassVar[str] = "verify"
    positional: ClassVar[tuple[str, ...]] = ("run", "artefacts")

    run: str = option(help="the run's folder, or that of its adapter", group="run", alias=("adapter",), min_length=1)
    artefacts: tuple[str, ...] = option(
        (), help="what to hold against it: folders of merged or quantised models, GGUF files (default: what was made "
        "from this run)",
        group="run",
    )  # fmt: skip
    url: str | None = option(
        None, help="an OpenAI-compatible server to hold against it as well, such as http://localhost:8000", group="run"
    )
    served_model: str | None = option(
        None, help="what that server calls the model (default: the first that it lists)", group="run"
    )
    against: str | None = option(
        None,
        help="load each artefact by these libraries too, divided by commas: transformers, peft (the adapter on its "
        "base), llama.cpp (GGUF files)",
        group="run",
    )
    reference: str | None = option(
        None, help="the run's data/reference.json, for an adapter that lies elsewhere", group="run"
    )
    out: str | None = option(
        None,
        help="where the result is kept (default: verify.json in the run's folder, or beside an adapter's)",
        group="run",
    )
    prompts: int | None = option(
        None, help="at most so many prompts of the training rows and of the held-out ones (default: all kept)",
        group="dataset", gt=0,
    )  # fmt: skip
    max_new_tokens: int = option(32, help="longest greedy answer, in tokens", group="dataset", gt=0)
    model: str | None = option(
        None, help="the base, where it is not where the run found it", group="base", alias=("base_model",)
    )
    revision: str | None = option(None, help="branch, tag or commit of a Hub model", group="base")
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto",
        help="precision to compare in; auto: the one that was trained in, and of each artefact the one it is stored in",
        group="base",
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", help="where to compute", group="base")

    @field_validator("against")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        for name in (value or "").split(","):
            if value is not None and name.strip() not in PEERS:
                close = nearest(name.strip(), PEERS)
                raise ValueError(
                    "any of transformers, peft, llama.cpp" + (f"; did you mean '{close}'?" if close else "")
                )
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.served_model and not self.url:
            raise ValueError("--served-model goes with --url")
        return self

    @property
    def peers(self) -> tuple[str, ...]:
        """``against``, one by one."""
        return tuple(name.strip() for name in self.against.split(",")) if self.against else ()
