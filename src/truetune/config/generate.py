"""Settings of ``truetune generate``."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import model_validator
from typing_extensions import Self

from truetune.config.mismatch import MismatchGroup
from truetune.config.options import option
from truetune.config.quant import QuantGroup
from truetune.config.weighted import check_weights, weighted


class AnswerGroup(QuantGroup, MismatchGroup):
    """Which model answers, how it is asked, and how tokens are chosen."""

    model: str = option(
        help="a local folder, or a name on the Hub", group="base", alias=("model_name_or_path",), min_length=1
    )
    revision: str | None = option(None, help="branch, tag or commit of a Hub model", group="base")
    adapter: tuple[str, ...] = option(
        (), help="an adapter's folder; several are added up, each times its weight: DIR=0.5", group="base"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("auto", help="precision", group="base")
    device: Literal["auto", "cpu", "cuda"] = option("auto", help="where to compute", group="base")
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
    top_k: int = option(0, help="draw among so many of the likeliest tokens; 0 for all", group="training", ge=0)
    min_p: float = option(
        0.0, help="draw among tokens at least so likely, as a share of the likeliest", group="training", ge=0, le=1
    )
    repetition_penalty: float = option(
        1.0, help="above 1, tokens that prompt or answer have become less likely", group="training", gt=0
    )
    presence_penalty: float = option(0.0, help="taken off the logits of tokens that the answer has", group="training")
    frequency_penalty: float = option(0.0, help="the same, for each time the answer has them", group="training")
    stop: tuple[str, ...] = option((), help="texts that end an answer; they are no part of it", group="training")
    seed: int = option(0, help="seed of the draws", group="training", ge=0)

    @property
    def weights(self) -> dict[str, float]:
        """Folder of an adapter → weight."""
        return dict(weighted(text) for text in self.adapter)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_weights(self.adapter)
        given = {"--top-p": self.top_p != 1, "--top-k": self.top_k, "--min-p": self.min_p}
        if not self.temperature and (flag := next((name for name, is_given in given.items() if is_given), None)):
            raise ValueError(
                f"{flag} needs --temperature above 0: at 0 the likeliest token is taken, and none is drawn"
            )
        if self.system is not None and self.template == "none":
            raise ValueError("--system needs a template to stand in, and --template none continues the bare prompt")
        if self.allowed and not self.adapter:
            flag = "--allow-other-base" if self.allow_other_base else "--allow-mismatch"
            raise ValueError(f"{flag} needs --adapter: without one there is nothing to differ from")
        return self


class GenerateConfig(AnswerGroup):
    """Settings of ``truetune generate``: answer prompts with a base, an adapter on it, or a merged model."""

    command: ClassVar[str] = "generate"

    prompt: tuple[str, ...] = option(
        (), help="what to answer, once or more often; - reads it from standard input", group="dataset"
    )
    input: str | None = option(
        None,
        help="a JSONL file: each row a prompt, an instruction, or messages; needs --output",
        group="dataset",
        min_length=1,
    )
    output: str | None = option(
        None,
        help="where the rows go with their answers; rows it has are not asked again",
        group="dataset",
        min_length=1,
    )
    json_schema: str | None = option(
        None, help="a file with a JSON schema: every answer is JSON that keeps to it", group="dataset", min_length=1
    )
    rows: int = option(8, help="answers that are computed together", group="run", gt=0)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if bool(self.prompt) == bool(self.input):
            raise ValueError("what to answer comes from --prompt, or from --input FILE.jsonl: one of the two")
        if bool(self.input) != bool(self.output):
            raise ValueError("--input and --output belong together")
        return self
