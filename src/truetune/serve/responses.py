"""The answers that go over the wire, as OpenAI's clients read them; what is not set is not sent."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

FinishReason = Literal["stop", "length", "tool_calls"]


class Answer(BaseModel):
    """Base of everything that is sent."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    def wire(self) -> str:
        """As JSON."""
        return self.model_dump_json(exclude_unset=True)


class Usage(Answer):
    """Tokens."""

    prompt_tokens: int
    completion_tokens: int = 0
    total_tokens: int


class TopLogprob(Answer):
    """A token that might have come, with the natural logarithm of its probability."""

    token: str
    logprob: float
    bytes: list[int] | None  # None for a token that is a part of a character


class TokenLogprobs(TopLogprob):
    """The token that came."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answer):
    """One entry for each token of the answer."""

    content: list[TokenLogprobs]
    refusal: None = None


class Function(Answer):
    """What is called; the arguments are JSON text."""

    name: str
    arguments: str


class ToolCall(Answer):
    """A call that an answer makes."""

    index: int = 0
    id: str
    type: Literal["function"]
    function: Function


class ChatMessage(Answer):
    """A whole answer, or a piece of one."""

    role: Literal["assistant"] = "assistant"
    content: str | None = None
    refusal: None = None
    tool_calls: list[ToolCall] = []


class ChatChoice(Answer):
    """One of the ``n`` answers."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatDelta(Answer):
    """A piece of one of them."""

    index: int
    delta: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatCompletion(Answer):
    """Of ``/v1/chat/completions``."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatChunk(Answer):
    """An event of a streamed one."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatDelta]
    usage: Usage | None = None


class TextLogprobs(Answer):
    """The older form, in columns."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(Answer):
    """One answer, or a piece of one."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None


class TextCompletion(Answer):
    """Of ``/v1/completions``, whole or an event."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = None


class Vector(Answer):
    """One embedding; base64 is of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Embeddings(Answer):
    """Of ``/v1/embeddings``."""

    object: Literal["list"]
    data: list[Vector]
    model: str
    usage: Usage


class Model(Answer):
    """One that can be asked: the base, or an adapter on it (then ``parent`` is the base)."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: Literal["truetune"]
    parent: str | None


class Models(Answer):
    """Of ``/v1/models``."""

    object: Literal["list"]
    data: list[Model]


class Health(Answer):
    """Of ``/health``."""

    status: Literal["ok", "draining"]


class Fault(Answer):
    """What went wrong, in OpenAI's form."""

    message: str
    type: str
    param: str | None
    code: str | None


class Failure(Answer):
    """The body of every refusal."""

    error: Fault
