"""The two kinds of completion, each whole and in pieces: what differs between the routes, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from truetune.generate.request import Delta, TokenLogprob
from truetune.serve.pieces import Heard, Label, chat_logprobs, text_logprobs, usage_of
from truetune.serve.responses import (
    Answer,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    FinishReason,
    TextChoice,
    TextCompletion,
    TextLogprobs,
    ToolCall,
)
from truetune.serve.wording import Job


class Spoken(Protocol):
    """Takes an answer's pieces in, and says what goes out."""

    job: Job
    heard: list[Heard]

    def opening(self) -> Iterator[Answer]:
        """What a stream begins with."""

    def pieces(self, number: int, deltas: Sequence[Delta]) -> Iterator[Answer]:
        """What neighbouring pieces of one answer add to a stream. Raises Refusal where the answer failed."""

    def closing(self) -> Answer:
        """A stream's last event, for who wants the usage."""

    def whole(self) -> Answer:
        """The whole answer, once every piece was heard."""


class SpokenChat:
    """Of ``/v1/chat/completions``."""

    def __init__(self, job: Job, *, wants_usage: bool, wants_logprobs: bool) -> None:
        self.job, self.label = job, Label.new("chatcmpl", job.voice.name)
        self._usage: dict[str, Any] = {"usage": None} if wants_usage else {}
        self._wants_logprobs = wants_logprobs
        self.heard = [Heard() for _ in job.requests]
        self._sent = [0] * len(job.requests)

    def opening(self) -> Iterator[Answer]:
        """The role, once for each answer."""
        for number in range(len(self.heard)):
            yield self._chunk(number, ChatMessage(role="assistant", content=""), None, None)

    def pieces(self, number: int, deltas: Sequence[Delta]) -> Iterator[Answer]:
        """As ``Spoken``."""
        heard, entries = self.heard[number], list[TokenLogprob]()
        for delta in deltas:
            entries += heard.hear(delta, self.job.voice.speaker.stop_ids)
        text, calls, finish = self._told(heard)
        new, self._sent[number] = text[self._sent[number] :], max(len(text), self._sent[number])
        if new or entries:
            yield self._chunk(number, ChatMessage(content=new), self._logprobs(entries), None)
        if calls:
            yield self._chunk(number, ChatMessage(tool_calls=calls), None, None)
        if finish:
            yield self._chunk(number, ChatMessage(), None, finish)

    def closing(self) -> Answer:
        """As ``Spoken``."""
        usage = usage_of(self.job.prompt_tokens, self.heard)
        return ChatChunk(**vars(self.label), object="chat.completion.chunk", choices=[], usage=usage)

    def whole(self) -> Answer:
        """As ``Spoken``."""
        return ChatCompletion(
            **vars(self.label), object="chat.completion", usage=usage_of(self.job.prompt_tokens, self.heard),
            choices=[self._choice(number, heard) for number, heard in enumerate(self.heard)],
        )  # fmt: skip

    def _told(self, heard: Heard) -> tuple[str, list[ToolCall], FinishReason | None]:
        """What of the text is certain, and the calls once all of it is."""
        form = self.job.tools
        if form is None:
            return heard.text, [], heard.finish
        if heard.finish is None:
            return heard.text[: form.certain(heard.text)], [], None
        text, calls = form.split(heard.text)
        return text, calls, "tool_calls" if calls else heard.finish

    def _choice(self, number: int, heard: Heard) -> ChatChoice:
        text, calls, finish = self._told(heard)
        message = ChatMessage(role="assistant", content=text if text or not calls else None, refusal=None)
        if calls:
            message.tool_calls = calls
        assert finish is not None
        return ChatChoice(index=number, message=message, logprobs=self._logprobs(heard.logprobs), finish_reason=finish)

    def _logprobs(self, entries: Sequence[TokenLogprob]) -> ChatLogprobs | None:
        return chat_logprobs(entries, self.job.voice.speaker.tokenizer) if self._wants_logprobs else None

    def _chunk(
        self, number: int, message: ChatMessage, logprobs: ChatLogprobs | None, finish: FinishReason | None
    ) -> ChatChunk:
        choice = ChatDelta(index=number, delta=message, logprobs=logprobs, finish_reason=finish)
        return ChatChunk(**vars(self.label), object="chat.completion.chunk", choices=[choice], **self._usage)


class SpokenText:
    """Of ``/v1/completions``."""

    def __init__(self, job: Job, *, wants_usage: bool, wants_logprobs: bool) -> None:
        self.job, self.label = job, Label.new("cmpl", job.voice.name)
        self._usage: dict[str, Any] = {"usage": None} if wants_usage else {}
        self._wants_logprobs = wants_logprobs
        self.heard = [Heard() for _ in job.requests]

    def opening(self) -> Iterator[Answer]:
        """The prompts, where they are to be repeated."""
        for number in range(len(self.heard)):
            if echo := self._echo(number):
                yield self._completion([self._choice(number, echo, (), 0, None)])

    def pieces(self, number: int, deltas: Sequence[Delta]) -> Iterator[Answer]:
        """As ``Spoken``."""
        heard, entries = self.heard[number], list[TokenLogprob]()
        before = len(heard.text)
        for delta in deltas:
            entries += heard.hear(delta, self.job.voice.speaker.stop_ids)
        if heard.finish or entries or len(heard.text) > before:
            yield self._completion([self._choice(number, heard.text[before:], entries, before, heard.finish)])

    def closing(self) -> Answer:
        """As ``Spoken``."""
        return self._completion([], usage=True)

    def whole(self) -> Answer:
        """As ``Spoken``."""
        choices = [
            self._choice(number, self._echo(number) + heard.text, heard.logprobs, 0, heard.finish)
            for number, heard in enumerate(self.heard)
        ]
        return self._completion(choices, usage=True)

    def _echo(self, number: int) -> str:
        return self.job.echoes[number * len(self.job.echoes) // len(self.heard)]

    def _choice(
        self, number: int, text: str, entries: Sequence[TokenLogprob], offset: int, finish: FinishReason | None
    ) -> TextChoice:
        logprobs: TextLogprobs | None = None
        if self._wants_logprobs:
            logprobs = text_logprobs(entries, self.job.voice.speaker.tokenizer, offset=offset)
        return TextChoice(index=number, text=text, logprobs=logprobs, finish_reason=finish)

    def _completion(self, choices: list[TextChoice], *, usage: bool = False) -> TextCompletion:
        found: dict[str, Any] = {"usage": usage_of(self.job.prompt_tokens, self.heard)} if usage else self._usage
        return TextCompletion(**vars(self.label), object="text_completion", choices=choices, **found)
