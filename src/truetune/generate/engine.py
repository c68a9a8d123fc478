"""The engine: many requests on one model, computed together, each as if it were alone.

Requests join and leave between steps. A step computes one token of every row that answers, and pieces of the prompts of
those that have yet to; rows with different adapters share it wherever the adapters can be applied row by row.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from truetune.adapters.virtual import virtual_ids
from truetune.errors import ConfigError, TruetuneError
from truetune.generate.direct import DirectRunner
from truetune.generate.pool import PagePool
from truetune.generate.request import Delta, Finish, Handle, Request, TokenLogprob
from truetune.generate.rows import Piece, Row
from truetune.generate.runner import PagedRunner, Runner, SingleRunner
from truetune.generate.sample import Draws, logprob
from truetune.generate.schedule import Schedule
from truetune.generate.shelf import AdapterShelf
from truetune.generate.text import TextStream
from truetune.models.load import context_length
from truetune.models.paged import PAGE, Pages, takes_pages

_log = logging.getLogger(__name__)
_STEP_TOKENS = 512


class Engine:
    """Answers requests on one model.

    Args:
        model: of transformers, in ``eval`` mode; its weights stop requiring gradients, and nothing else changes.
        tokenizer: what turns ids into text, with transformers' own as ``hf``.
        max_rows: answers that are computed together.
        max_tokens: tokens whose keys and values are kept, over all rows and the beginnings that may come again.
        step_tokens: tokens that one step computes; a longer prompt takes several.
        adapter_memory: bytes that loaded adapters may take; None for no limit.
        direct: compute layers that are built like Llama's from their parts; False runs the model's own code.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_rows: int = 16,
        max_tokens: int = 32_768,
        step_tokens: int = _STEP_TOKENS,
        adapter_memory: int | None = None,
        direct: bool = True,
    ) -> None:
        for name, value in (("max_rows", max_rows), ("max_tokens", max_tokens), ("step_tokens", step_tokens)):
            if value < 1:
                raise ConfigError(f"{name}: found {value}", ("expected", "1 or more"))
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        self.context = context_length(model.config)
        self._virtual = tuple(virtual_ids(model))  # of an adapter that the model itself carries
        self._lock = threading.RLock()  # held while the model computes, or is changed
        self._news = threading.Condition()
        self._arrived: list[Row] = []
        self._rows: dict[int, Row] = {}
        self.runner = _runner(model, -(-max_tokens // PAGE), direct)
        self.pool = None if self.runner.pages is None else PagePool(self.runner.pages.count)
        self._schedule = Schedule(self.pool, max_rows=max_rows, step_tokens=step_tokens)
        self.adapters = AdapterShelf(model, self._lock, adapter_memory)
        self._thread: threading.Thread | None = None
        self._stopping, self._drain = False, True
        self._tokens, self._steps = 0, 0

    # ---- asked from any thread

    def submit(self, request: Request, on_delta: Callable[[Delta], None] | None = None) -> Handle:
        """Ask for an answer.

        Args:
            on_delta: called with each piece from the engine's thread, which waits for it; else the handle is iterated.
        Raises:
            ConfigError: an empty prompt, one that does not fit, or ids that the model lacks.
            AdapterError: an adapter that is not registered.
        """
        self._check(request)
        handle = Handle(self._cancel, on_delta)
        row = Row(
            request, handle, TextStream(self.tokenizer.hf, request.stop),
            Draws(request.sampling, request.prompt_ids), request.max_new_tokens,
        )  # fmt: skip
        with self._news:
            if self._stopping:
                raise ConfigError("the engine is stopping: it takes no more requests")
            self._rows[id(handle)] = row
            self._arrived.append(row)
            self._news.notify()
        return handle

    def start(self) -> None:
        """Run the loop in a thread of its own."""
        with self._news:
            if self._thread is not None:
                return
            self._stopping = False
            self._thread = threading.Thread(target=self._loop, name="truetune-engine", daemon=True)
        self._thread.start()

    def stop(self, *, drain: bool = True) -> None:
        """End the loop, after all that was asked (``drain``), or at once: what runs then ends as ``cancelled``."""
        with self._news:
            thread, self._thread = self._thread, None
            self._stopping, self._drain = True, drain
            self._news.notify()
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        elif drain:
            while self.step():
                pass
        if not drain:
            self._cancel_all()
        with self._news:
            self._stopping = False

    def stats(self) -> dict[str, Any]:
        """Figures of this moment: rows, tokens since the start, pages, adapters."""
        pool = self.pool
        return {
            "running": len(self._schedule.running),
            "waiting": len(self._schedule.waiting) + len(self._arrived),
            "tokens": self._tokens,
            "steps": self._steps,
            "kv_tokens": pool.held * PAGE if pool else sum(row.computed for row in list(self._schedule.running)),
            "kv_capacity": pool.count * PAGE if pool else None,
            "kv_bytes": self.runner.pages.nbytes if self.runner.pages else 0,
            "adapters": self.adapters.names(),
            "adapters_loaded": self.adapters.loaded(),
            "adapters_bytes": self.adapters.nbytes,
            "path": type(self.runner).__name__.removesuffix("Runner").lower(),
        }

    @property
    def lock(self) -> threading.RLock:
        """Held while the model computes; who computes with it beside the engine holds it too."""
        return self._lock

    # ---- the loop

    def step(self) -> bool:
        """Compute one step; False where there was nothing to do."""
        with self._lock:
            self._take_news()
            pieces = self._schedule.pieces()
            if not pieces:
                return bool(self._schedule.running or self._schedule.waiting)
            # Rows with a cache of their own are computed one by one anyway: alone, a failure is nobody else's.
            for together in _groups(pieces) if self.pool else [[piece] for piece in pieces]:
                self._compute(together)
            self._steps += 1
            return True

    def _loop(self) -> None:
        while True:
            with self._news:
                while not (self._arrived or self._schedule.running or self._schedule.waiting or self._stopping):
                    self._news.wait()
                if self._stopping and not (self._drain and (self._arrived or self._busy)):
                    return
            try:
                self.step()
            except Exception as error:  # nothing of one request's: those are caught where they happen
                _log.exception("a step failed")
                self._fail_all(error)
            time.sleep(0)  # lets those in who wait for the lock

    @property
    def _busy(self) -> bool:
        return bool(self._schedule.running or self._schedule.waiting)

    def _check(self, request: Request) -> None:
        ids, vocab = request.prompt_ids, self.model.get_input_embeddings().weight.shape[0]
        if not len(ids):
            raise ConfigError("the prompt is empty", ("expected", "at least one token"))
        if wrong := next((i for i in ids if not 0 <= i < vocab), None):
            raise ConfigError(
                f"the prompt has the id {wrong}", ("expected", f"0 to {vocab - 1}, the model's vocabulary")
            )
        if request.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens: found {request.max_new_tokens}", ("expected", "1 or more"))
        if request.adapter is not None:
            self.adapters.check(request.adapter)
        if (room := self._room(len(ids))) < 1:
            what = "the model's context" if self.context and len(ids) >= self.context else "the engine's max_tokens"
            raise ConfigError(
                f"the prompt has {len(ids):,} tokens, and {what} is {len(ids) + room:,}",
                ("way out", "a shorter prompt: at least one token has to follow it"),
            )

    def _room(self, used: int) -> int:
        """New tokens that fit behind so many."""
        limits = [self.context] if self.context else []
        limits += [self.pool.count * PAGE] if self.pool else []
        return min(limits, default=1 << 62) - used

    def _take_news(self) -> None:
        with self._news:
            arrived, self._arrived = self._arrived, []
            cancelled = [row for row in self._rows.values() if row.cancelled]
        for row in arrived:
            if not row.cancelled:
                self._begin(row)
        for row in cancelled:
            self._end(row, Delta(finish="cancelled"))

    def _begin(self, row: Row) -> None:
        """Give a row its adapter and its place in the line."""
        request = row.request
        try:
            row.adapter = self.adapters.get(request.adapter) if request.adapter is not None else None
            virtual = row.adapter.virtual_ids if row.adapter else self._virtual
            row.ids = [*virtual, *request.prompt_ids]
            row.room = min(request.max_new_tokens, self._room(len(row.ids)))
            if row.room < 1:
                raise ConfigError(f"the adapter's {len(virtual)} virtual tokens leave no room for the prompt")
        except Exception as error:
            self._fail(row, error)
            return
        self._schedule.waiting.append(row)

    def _compute(self, pieces: Sequence[Piece]) -> None:
        """Pieces that can share a forward; where that fails, each alone, so that one can't spoil the others'."""
        try:
            logits = self._forward(pieces)
        except Exception as error:
            if len(pieces) == 1:
                _log.warning("a request failed: %s", error)
                self._fail(pieces[0].row, error)
                return
            for piece in pieces:
                self._compute([piece])
            return
        number = 0
        for piece in pieces:
            ends = piece.ends
            self._schedule.computed(piece.row, piece.count)
            if ends:
                try:
                    self._choose(piece.row, logits[number])
                except Exception as error:
                    self._fail(piece.row, error)
                number += 1

    def _forward(self, pieces: Sequence[Piece]) -> Tensor:
        adapter = pieces[0].row.adapter
        with torch.no_grad():
            if adapter is None or adapter.terms is not None:
                return self.runner.logits(pieces)
            with adapter.mounted(self.model):
                return self._own_code.logits(pieces)

    @property
    def _own_code(self) -> Runner:
        """What computes adapters that take layers' places."""
        return self.runner.own if isinstance(self.runner, DirectRunner) else self.runner

    def _choose(self, row: Row, logits: Tensor) -> None:
        """The row's next token, and what there is to say with it."""
        token = row.draws.choose(logits)
        request = row.request
        wanted = None if request.logprobs is None else (logprob(logits, token, request.logprobs),)
        row.ids.append(token)
        row.answered += 1
        self._tokens += 1
        if token in request.stop_ids:
            self._end(row, self._last(row, row.text.end(), token, wanted, "stop"))
            return
        text = row.text.push(token)
        if row.text.stopped:
            self._end(row, Delta(text, (token,), wanted, "stop"))
        elif row.answered >= row.room:
            self._end(row, self._last(row, text + row.text.end(), token, wanted, "length"))
        else:
            self._deliver(row, Delta(text, (token,), wanted))

    @staticmethod
    def _last(row: Row, text: str, token: int, wanted: tuple[TokenLogprob, ...] | None, finish: Finish) -> Delta:
        return Delta(text, (token,), wanted, "stop" if row.text.stopped else finish)

    # ---- endings

    def _cancel(self, handle: Handle) -> None:
        with self._news:
            if row := self._rows.get(id(handle)):
                row.cancelled = True
                self._news.notify()

    def _cancel_all(self) -> None:
        with self._lock:
            with self._news:
                for row in self._rows.values():
                    row.cancelled = True
            self._take_news()

    def _fail(self, row: Row, error: Exception) -> None:
        said = error.message if isinstance(error, TruetuneError) else f"{type(error).__name__}: {error}"
        self._end(row, Delta(finish="error", error=said))

    def _fail_all(self, error: Exception) -> None:
        with self._lock:
            for row in list(self._rows.values()):
                self._fail(row, error)

    def _end(self, row: Row, delta: Delta) -> None:
        self._schedule.remove(row)
        with self._news:
            self._rows.pop(id(row.handle), None)
        try:
            row.handle.deliver(delta)
        except Exception:
            _log.exception("the listener of a request failed at its end")

    def _deliver(self, row: Row, delta: Delta) -> None:
        try:
            row.handle.deliver(delta)
        except Exception:
            _log.exception("the listener of a request failed: it is cancelled")
            row.cancelled = True


def _runner(model: Any, pages: int, direct: bool) -> Runner:
    """The fastest way that gives what the model gives."""
    if not takes_pages(model):
        return SingleRunner(model)
    own = PagedRunner(model, Pages(pages))
    return (DirectRunner.of(own) if direct else None) or own


def _groups(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Pieces that can share a forward: all with no adapter or one that goes row by row, and those of each other one.

    Within a group, rows of one adapter are neighbours.
    """
    groups: dict[str, list[Piece]] = {}
    for piece in sorted(pieces, key=lambda piece: piece.row.owner):
        adapter = piece.row.adapter
        together = "" if adapter is None or adapter.terms is not None else adapter.owner
        groups.setdefault(together, []).append(piece)
    return list(groups.values())
