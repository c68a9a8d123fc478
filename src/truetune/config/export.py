"""Settings of ``truetune export``."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import model_validator
from typing_extensions import Self

from truetune.config.mismatch import MismatchGroup
from truetune.config.options import option

Target = Literal["hf", "peft-serving", "gguf", "ollama", "card"]
GGUFType = Literal["auto", "f32", "f16", "bf16", "q8_0"]


class ExportConfig(MismatchGroup):
    """Settings of ``truetune export``: what was trained, in the form that another program takes."""

    command: ClassVar[str] = "export"

    model: str | None = option(
        None,
        help="the base, or a model to export as it is (default: the base that the adapter names)",
        group="base",
        alias=("base_model",),
        min_length=1,
    )
    revision: str | None = option(None, help="branch, tag or commit of a Hub model", group="base")
    adapter: str | None = option(None, help="an adapter's folder, or its run's", group="base", min_length=1)
    to: Target = option(
        help="hf: one model for transformers; peft-serving: an adapter that vLLM takes; gguf: a file for llama.cpp; "
        "ollama: that and a Modelfile; card: README.md for the Hub",
        group="run",
    )
    out: str = option(
        help="folder for the result, new or empty (card: that of the weights will do); for gguf also FILE.gguf",
        group="run",
        alias=("output_dir", "output"),
        min_length=1,
    )
    gguf_type: GGUFType = option(
        "auto",
        help="numbers of the matrices in a GGUF: auto keeps the checkpoint's; q8_0 stores 8 bits and a scale per 32",
        group="run",
        alias=("outtype",),
    )
    as_adapter: bool = option(
        False, help="gguf, ollama: keep the adapter a file of its own beside the base's, not merged into it",
        group="run",
    )  # fmt: skip
    template: str = option(
        "auto",
        help="chat template that goes with it: auto (the adapter's, else the tokenizer's own), a name, or a file",
        group="run",
    )  # fmt: skip
    system: str | None = option(
        None, help="ollama: system message of the Modelfile (default: the one it was trained with)", group="run"
    )
    license: str | None = option(
        None, help="card: the licence under which you give it away, such as apache-2.0", group="run"
    )
    max_shard_gb: float = option(5.0, help="hf: largest weight file, in GB", group="run", gt=0)
    push: str | None = option(
        None, help="upload the result to this repository of the Hub, ORG/NAME; nothing is sent without it",
        group="run",
    )  # fmt: skip

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.model is None and self.adapter is None:
            raise ValueError("--model or --adapter is missing: what is to be exported?")
        if self.adapter is None and self.to in ("hf", "peft-serving"):
            raise ValueError(f"--to {self.to} wants an --adapter: a model without one is in that form already")
        if self.as_adapter and (self.adapter is None or self.to not in ("gguf", "ollama")):
            raise ValueError("--as-adapter goes with an --adapter and --to gguf or ollama")
        if self.gguf_type != "auto" and self.to not in ("gguf", "ollama"):
            raise ValueError(f"--gguf-type: --to {self.to} writes no GGUF; gguf and ollama do")
        if self.system is not None and self.to != "ollama":
            raise ValueError(f"--system: --to {self.to} has no place for it; ollama has")
        if self.license is not None and self.to != "card":
            raise ValueError(f"--license: --to {self.to} writes no card; --to card does")
        if self.template != "auto" and self.to not in ("gguf", "ollama"):
            raise ValueError(f"--template: --to {self.to} takes the one that was trained; gguf and ollama take another")
        if self.push is not None and (self.push.count("/") != 1 or not all(self.push.split("/"))):
            raise ValueError("--push: a repository of the Hub is ORG/NAME")
        return self
