"""What goes over the wire: OpenAI's requests, with the fields that this server acts on, and its answers.

A field that would change the answer and can't be honoured is refused by name, never dropped. Fields that only label a
request (``user``, ``metadata``, …) are taken and have no effect.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from typing_extensions import Self

from truetune.generate import grammar

MOST_CHOICES, MOST_STOPS, MOST_TOP, MOST_PROMPTS = 16, 16, 20, 64


class Wire(BaseModel):
    """Read strictly: a number in quotes is no number."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


Ids = list[Annotated[int, Field(ge=0, lt=2**31)]]
Stop = Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=MOST_STOPS)]


class StreamOptions(Wire):
    """How an answer is streamed."""

    include_usage: bool = False
    include_obfuscation: bool = False


class JsonSchema(Wire):
    """A schema by name; what can't be kept to in it is refused, ``strict`` or not."""

    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Wire):
    """What an answer has to look like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("type 'json_schema' and the field json_schema go together")
        return self

    @property
    def rule(self) -> str | None:
        """As a rule of a grammar; None for any text."""
        if self.type == "text":
            return None
        given = self.json_schema.schema_ if self.json_schema is not None else None
        return grammar.of_json({"type": "object"} if given is None else given)


class ToolName(Wire):
    """Which tool."""

    name: str


class NamedTool(Wire):
    """A tool that has to be called."""

    type: Literal["function"]
    function: ToolName


class Labels(Wire):
    """What clients send along and no answer depends on."""

    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class Asked(Labels):
    """What both kinds of completion take. Defaults are OpenAI's; ``top_k``, ``min_p`` and ``repetition_penalty`` are
    additions."""

    model: Annotated[str, Field(min_length=1, examples=["base"])]
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = 1
    stop: Annotated[str, Field(min_length=1)] | Stop | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = 0
    min_p: Annotated[float, Field(ge=0, le=1)] | None = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = 1.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = 0.0
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logit_bias: dict[str, float] | None = None

    @model_validator(mode="after")
    def _supported(self) -> Self:
        if self.logit_bias:
            raise ValueError("logit_bias is not supported")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream: true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class Turn(BaseModel):
    """A message; what its parts may be is for the reader of training rows to say, so that both are read alike."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: str
    content: str | list[dict[str, Any]] | None = None


class ChatRequest(Asked):
    """The body of ``/v1/chat/completions``."""

    messages: Annotated[list[Turn], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = True
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs: true")
        has_form = self.response_format is not None and self.response_format.type != "text"
        if self.parallel_tool_calls is False and self.tools and not (has_form or self.forces_a_call):
            raise ValueError("parallel_tool_calls: the number of calls can be limited where tool_choice forces one")
        if has_form and self.forces_a_call:
            raise ValueError("tool_choice forces a call, and response_format another answer: leave one of them out")
        return self

    @property
    def forces_a_call(self) -> bool:
        """Whether the answer has to be a call."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)


class CompletionRequest(Asked):
    """The body of ``/v1/completions``; the prompt is continued as it is, without a template."""

    prompt: str | list[str] | Ids | list[Ids]
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None
    echo: bool | None = False
    best_of: int | None = None
    suffix: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.suffix:
            raise ValueError("suffix is not supported")
        if self.best_of not in (None, self.n or 1):
            raise ValueError("best_of is not supported, unless it is n")
        if self.echo and self.logprobs is not None:
            raise ValueError("echo does not go with logprobs: those of a prompt are not computed")
        if isinstance(self.prompt, list) and not self.prompt:
            raise ValueError("prompt: at least one is needed")
        return self


class EmbeddingRequest(Labels):
    """The body of ``/v1/embeddings``."""

    model: Annotated[str, Field(min_length=1, examples=["base"])]
    input: str | list[str] | Ids | list[Ids]
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: int | None = None

    @model_validator(mode="after")
    def _supported(self) -> Self:
        if self.dimensions is not None:
            raise ValueError("dimensions is not supported: a vector is as long as the model's hidden state")
        if not self.input:
            raise ValueError("input: at least one text is needed")
        return self
