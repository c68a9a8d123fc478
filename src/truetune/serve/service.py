"""What the routes do: each takes a body, and answers or raises a Refusal."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from truetune.config.serve import ServeConfig
from truetune.errors import AdapterError, TruetuneError
from truetune.generate.engine import Engine
from truetune.generate.loaded import LoadedAdapter
from truetune.generate.shelf import AdapterChangedError
from truetune.serve.catalogue import Catalogue, Voice
from truetune.serve.embeddings import check, encoded, mean_state
from truetune.serve.limits import Gate
from truetune.serve.metrics import Metrics
from truetune.serve.openapi import document
from truetune.serve.pieces import Heard
from truetune.serve.protocol import Asked, ChatRequest, CompletionRequest, EmbeddingRequest
from truetune.serve.refusal import of_error, too_late, unavailable
from truetune.serve.responses import Embeddings, Health, Model, Models, Usage, Vector
from truetune.serve.running import News, Running
from truetune.serve.spoken import Spoken, SpokenChat, SpokenText
from truetune.serve.stream import ClientLeftError, heard_whole, send_stream, unless_left
from truetune.serve.wording import Allowance, Job, of_chat, of_completion, prompts_of

T = TypeVar("T")
_TRIES = 3


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
    allowed: Allowance
    metrics: Metrics = field(default_factory=Metrics)
    workers: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(8, "truetune-serve"))

    async def chat(self, body: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        """``POST /v1/chat/completions``."""
        asked = ChatRequest.model_validate_json(body)

        def worded(voice: Voice) -> Job:
            return of_chat(asked, voice, self.allowed)

        def spoken(job: Job) -> Spoken:
            return SpokenChat(job, wants_usage=asked.wants_usage, wants_logprobs=bool(asked.logprobs))

        with self.gate.room_for(asked.n or 1):
            whole = await self._answer(asked, worded, spoken, (receive, send))
        await _sent(whole, scope, receive, send)

    async def completion(self, body: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        """``POST /v1/completions``."""
        asked = CompletionRequest.model_validate_json(body)

        def worded(voice: Voice) -> Job:
            return of_completion(asked, voice, self.allowed)

        def spoken(job: Job) -> Spoken:
            return SpokenText(job, wants_usage=asked.wants_usage, wants_logprobs=asked.logprobs is not None)

        with self.gate.room_for((asked.n or 1) * len(prompts_of(asked.prompt, "prompt"))):
            whole = await self._answer(asked, worded, spoken, (receive, send))
        await _sent(whole, scope, receive, send)

    async def embedding(self, body: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        """``POST /v1/embeddings``."""
        asked = EmbeddingRequest.model_validate_json(body)
        texts = prompts_of(asked.input, "input")
        self.allowed.check(texts, "input")

        def read(voice: Voice) -> tuple[list[list[int]], LoadedAdapter | None]:
            encode = voice.speaker.tokenizer.encode
            ids = [encode([text])[0] if isinstance(text, str) else list(text) for text in texts]
            check(self.engine, ids)
            return ids, None if voice.adapter is None else self.engine.adapters.get(voice.adapter)

        async def computed() -> tuple[int, list[list[float] | str]]:
            ids, loaded = await self._with_voice(asked.model, read)
            vectors = [await self._aside(partial(mean_state, self.engine, text, loaded)) for text in ids]
            return sum(map(len, ids)), [encoded(vector, asked.encoding_format) for vector in vectors]

        with self.gate.room_for(len(texts)):
            count, found = await self._while_wanted(receive, self._in_time(computed()))
        self.metrics.prompt_tokens[asked.model] += count
        data = [Vector(object="embedding", index=i, embedding=vector) for i, vector in enumerate(found)]
        usage = Usage(prompt_tokens=count, total_tokens=count)
        answer = Embeddings(object="list", data=data, model=asked.model, usage=usage)
        await _sent(await self._aside(answer.wire), scope, receive, send)

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

    async def _answer(
        self, asked: Asked, worded: Callable[[Voice], Job], spoken_of: Callable[[Job], Spoken],
        ends: tuple[Receive, Send],
    ) -> str | None:  # fmt: skip
        """The whole answer as JSON; None where it was streamed."""
        for _ in range(_TRIES):
            began = time.perf_counter()
            job = await self._with_voice(asked.model, worded)
            running = Running(self.engine, job.requests, workers=self.workers, seconds=self.config.max_seconds,
                              seen=self._timed(began))  # fmt: skip
            try:
                async with running:
                    return await self._told(running, spoken_of(job), ends, stream=bool(asked.stream), began=began,
                                            usage=asked.wants_usage)  # fmt: skip
            except AdapterChangedError as error:  # nothing of the answer was made yet: once more, for the new one
                changed = error
        raise unavailable(asked.model, changed)

    async def _told(
        self, running: Running, spoken: Spoken, ends: tuple[Receive, Send], *, stream: bool, usage: bool, began: float
    ) -> str | None:
        receive, send = ends
        try:
            if stream:
                work = send_stream(running, spoken, send, wants_usage=usage, stall=self.config.max_stall)
                await self._while_wanted(receive, work)
            else:
                await self._while_wanted(receive, heard_whole(running, spoken))
        finally:
            self._count(spoken.job, spoken.heard)
        self.metrics.whole.observe(time.perf_counter() - began)
        # In another thread: with the likeliest tokens at every place it can be megabytes.
        return None if stream else await self._aside(lambda: spoken.whole().wire())

    async def _while_wanted(self, receive: Receive, work: Awaitable[T]) -> T:
        try:
            return await unless_left(receive, work)
        except ClientLeftError:
            self.metrics.cancelled += 1
            raise

    async def _in_time(self, work: Awaitable[T]) -> T:
        try:
            return await asyncio.wait_for(work, self.config.max_seconds)
        except (TimeoutError, asyncio.TimeoutError):
            raise too_late(self.config.max_seconds) from None

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
        except AdapterError as error:
            raise unavailable(name, error) from None
        except TruetuneError as error:
            raise of_error(error) from None

    async def _aside(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.workers, work)


async def _sent(text: str | None, scope: Scope, receive: Receive, send: Send) -> None:
    if text is not None:
        await _json(text)(scope, receive, send)


def _json(text: str, status: int = 200) -> Response:
    return Response(text, status, media_type="application/json")
