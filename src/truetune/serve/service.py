"""What the routes do: each takes a body, and answers or raises a Refusal."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from truetune.config.serve import ServeConfig
from truetune.errors import TruetuneError
from truetune.generate.engine import Engine
from truetune.serve.catalogue import Catalogue, Voice
from truetune.serve.embeddings import embed, encoded
from truetune.serve.limits import Gate
from truetune.serve.metrics import Metrics
from truetune.serve.openapi import document
from truetune.serve.pieces import Heard
from truetune.serve.protocol import ChatRequest, CompletionRequest, EmbeddingRequest
from truetune.serve.refusal import of_error
from truetune.serve.responses import Embeddings, Health, Model, Models, Usage, Vector
from truetune.serve.running import News, Running
from truetune.serve.spoken import Spoken, SpokenChat, SpokenText
from truetune.serve.stream import ClientLeftError, heard_whole, send_stream, unless_left
from truetune.serve.wording import Job, of_chat, of_completion, prompts_of

T = TypeVar("T")


@dataclass
class Service:
    """The routes and what they share.

    Attributes:
        workers: for what takes longer than an event loop may wait: disks, templates, tokenizers, the engine's lock.
    """

    config: ServeConfig
    engine: Engine
    catalogue: Catalogue
    gate: Gate
    metrics: Metrics = field(default_factory=Metrics)
    workers: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(8, "truetune-serve"))

    async def chat(self, body: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        """``POST /v1/chat/completions``."""
        asked = ChatRequest.model_validate_json(body)

        def worded(voice: Voice) -> Job:
            return of_chat(asked, voice, longest=self.config.max_new_tokens)

        with self.gate.room_for(asked.n or 1):
            job = await self._with_voice(asked.model, worded)
            spoken = SpokenChat(job, wants_usage=asked.wants_usage, wants_logprobs=bool(asked.logprobs))
            await self._answer(spoken, (scope, receive, send), stream=bool(asked.stream), usage=asked.wants_usage)

    async def completion(self, body: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        """``POST /v1/completions``."""
        asked = CompletionRequest.model_validate_json(body)

        def worded(voice: Voice) -> Job:
            return of_completion(asked, voice, longest=self.config.max_new_tokens)

        with self.gate.room_for((asked.n or 1) * len(prompts_of(asked.prompt, "prompt"))):
            job = await self._with_voice(asked.model, worded)
            spoken = SpokenText(job, wants_usage=asked.wants_usage, wants_logprobs=asked.logprobs is not None)
            await self._answer(spoken, (scope, receive, send), stream=bool(asked.stream), usage=asked.wants_usage)

    async def embedding(self, body: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        """``POST /v1/embeddings``."""
        asked = EmbeddingRequest.model_validate_json(body)
        texts = prompts_of(asked.input, "input")

        def computed(voice: Voice) -> Embeddings:
            encode = voice.speaker.tokenizer.encode
            ids = [encode([text])[0] if isinstance(text, str) else list(text) for text in texts]
            vectors = [encoded(v, asked.encoding_format) for v in embed(self.engine, ids, adapter=voice.adapter)]
            count = sum(map(len, ids))
            data = [Vector(object="embedding", index=i, embedding=vector) for i, vector in enumerate(vectors)]
            usage = Usage(prompt_tokens=count, total_tokens=count)
            return Embeddings(object="list", data=data, model=voice.name, usage=usage)

        with self.gate.room_for(1):
            answer = await self._with_voice(asked.model, computed)
        self.metrics.prompt_tokens[answer.model] += answer.usage.prompt_tokens
        await _json(answer.wire())(scope, receive, send)

    async def models(self, scope: Scope, receive: Receive, send: Send) -> None:
        """``GET /v1/models``."""
        names = await self._aside(self.catalogue.names)
        base = self.catalogue.base
        data = [
            Model(id=name, object="model", created=base.created, owned_by="truetune",
                  parent=None if name == base.name else base.name)
            for name in names
        ]  # fmt: skip
        await _json(Models(object="list", data=data).wire())(scope, receive, send)

    async def health(self, scope: Scope, receive: Receive, send: Send) -> None:
        """``GET /health``: 503 once the server was asked to stop."""
        state = Health(status="draining" if self.gate.closed else "ok")
        await _json(state.wire(), 503 if self.gate.closed else 200)(scope, receive, send)

    async def figures(self, scope: Scope, receive: Receive, send: Send) -> None:
        """``GET /metrics``."""
        stats = await self._aside(self.engine.stats)
        text = self.metrics.text(stats, taken=self.gate.taken)
        await Response(text, media_type="text/plain; version=0.0.4")(scope, receive, send)

    async def openapi(self, scope: Scope, receive: Receive, send: Send) -> None:
        """``GET /openapi.json``."""
        await _json(document(with_token=self.config.token is not None))(scope, receive, send)

    async def _answer(self, spoken: Spoken, ends: tuple[Scope, Receive, Send], *, stream: bool, usage: bool) -> None:
        scope, receive, send = ends
        began = time.perf_counter()
        seen = self._timed(began)
        running = Running(self.engine, spoken.job.requests, workers=self.workers, seconds=self.config.max_seconds,
                          seen=seen)  # fmt: skip
        try:
            async with running:
                if stream:
                    work = send_stream(running, spoken, send, wants_usage=usage, stall=self.config.max_stall)
                    await unless_left(receive, work)
                else:
                    await unless_left(receive, heard_whole(running, spoken))
        except ClientLeftError:
            self.metrics.cancelled += 1
            raise
        finally:
            self._count(spoken.job, spoken.heard)
        self.metrics.whole.observe(time.perf_counter() - began)
        if not stream:
            await _json(spoken.whole().wire())(scope, receive, send)

    def _timed(self, began: float) -> Callable[[News], None]:
        first = True

        def seen(news: News) -> None:
            nonlocal first
            if first:
                self.metrics.first.observe(time.perf_counter() - began)
            first = False

        return seen

    def _count(self, job: Job, heard: list[Heard]) -> None:
        self.metrics.prompt_tokens[job.voice.name] += job.prompt_tokens
        self.metrics.answer_tokens[job.voice.name] += sum(one.tokens for one in heard)

    async def _with_voice(self, name: str, work: Callable[[Voice], T]) -> T:
        """``work`` with a model, in a thread of its own."""

        def both() -> T:
            return work(self.catalogue.get(name))

        try:
            return await self._aside(both)
        except TruetuneError as error:
            raise of_error(error) from None

    async def _aside(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.workers, work)


def _json(text: str, status: int = 200) -> Response:
    return Response(text, status, media_type="application/json")
