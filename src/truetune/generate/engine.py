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

from truetune.errors import ConfigError, TruetuneError
from truetune.generate.admission import Admission
from truetune.generate.grammar import Grammars
from truetune.generate.pool import PagePool
from truetune.generate.request import Delta, Handle, Request
from truetune.generate.rows import Piece, Row
from truetune.generate.schedule import Schedule
from truetune.generate.shelf import AdapterShelf
from truetune.generate.step import advance, fastest, forward, groups
from truetune.models.paged import PAGE

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
        self._lock = threading.RLock()  # held while the model computes, or is changed
        self._news = threading.Condition()
        self._arrived: list[Row] = []
        self._rows: dict[int, Row] = {}
        self.runner = fastest(model, -(-max_tokens // PAGE), direct=direct)
        self.pool = None if self.runner.pages is None else PagePool(self.runner.pages.count)
        self._schedule = Schedule(self.pool, max_rows=max_rows, step_tokens=step_tokens)
        self.adapters = AdapterShelf(model, self._lock, adapter_memory)
        self.grammars = Grammars(tokenizer.hf)
        self.capacity = self.pool.count * PAGE if self.pool else None  # tokens whose keys and values can be kept
        self._admission = Admission(model, tokenizer, self.adapters, self.capacity)
        self.context = self._admission.context
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
            AdapterError: an adapter that is not registered, or that can't be loaded any more.
            AdapterChangedError: it is not the one that the request was made for.
        """
        handle = Handle(self._cancel, on_delta)
        row = self._admission.row(request, handle)
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
            "kv_capacity": self.capacity,
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
            for together in groups(self.runner, pieces):
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

    def _take_news(self) -> None:
        with self._news:
            arrived, self._arrived = self._arrived, []
            cancelled = [row for row in self._rows.values() if row.cancelled]
        self._schedule.waiting.extend(row for row in arrived if not row.cancelled)
        for row in cancelled:
            self._end(row, Delta(finish="cancelled"))

    def _compute(self, pieces: Sequence[Piece]) -> None:
        """Pieces that can share a forward; where that fails, each alone, so that one can't spoil the others'."""
        try:
            logits = forward(self.model, self.runner, pieces)
        except Exception as error:
            if len(pieces) == 1:
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

    def _choose(self, row: Row, logits: Any) -> None:
        delta = advance(row, logits)
        self._tokens += 1
        if delta.finish is None:
            self._deliver(row, delta)
        else:
            self._end(row, delta)

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
        if isinstance(error, TruetuneError):
            said = error.message
            _log.warning("a request failed: %s", error)
        else:  # in words that nobody chose for those who asked
            said = "the model failed at this answer; the log says how"
            _log.error("a request failed", exc_info=error)
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
