"""What is computed next: rows that answer go first, the rest of a step's tokens go to prompts, oldest first."""

from __future__ import annotations

from collections import deque

from truetune.generate.pool import PagePool, page_keys
from truetune.generate.rows import Piece, Row
from truetune.models.paged import PAGE


class Schedule:
    """The rows of an engine.

    Args:
        pool: where keys and values are kept; None for a model that keeps its own.
        max_rows: rows that are computed together.
        step_tokens: tokens of one step; a longer prompt is computed in pieces, while others go on answering.
    """

    def __init__(self, pool: PagePool | None, *, max_rows: int, step_tokens: int) -> None:
        self.pool, self.max_rows, self.step_tokens = pool, max_rows, step_tokens
        self.waiting: deque[Row] = deque()
        self.running: list[Row] = []  # oldest first

    def pieces(self) -> list[Piece]:
        """The work of one step. Rows may be sent back to wait where pages are short; the oldest never is."""
        left = self.step_tokens
        planned: list[Piece] = []
        for row in sorted(self.running, key=lambda row: row.pending > 1):
            count = min(row.pending, left)
            if row not in self.running or not count:
                continue
            if self._find_pages(row, count, planned):
                planned.append(Piece(row, count))
                left -= count
        while left and self.waiting and len(self.running) < self.max_rows:
            row = self.waiting[0]
            if not self._admit(row, left):
                break
            self.waiting.popleft()
            self.running.append(row)
            count = min(row.pending, left)
            planned.append(Piece(row, count))
            left -= count
        return planned

    def remove(self, row: Row) -> None:
        """The row has ended: its pages stay known for texts that begin like it."""
        if row in self.running:
            self.running.remove(row)
        elif row in self.waiting:
            self.waiting.remove(row)
        self._let_go(row)

    def computed(self, row: Row, count: int) -> None:
        """So many of its tokens are in its pages now; full pages become known."""
        before = row.computed
        row.computed += count
        if self.pool is not None and row.computed // PAGE > before // PAGE:
            for page, key in zip(row.pages, row.keys(), strict=False):
                self.pool.name(page, key)

    def _find_pages(self, row: Row, count: int, planned: list[Piece]) -> bool:
        """Give a row the pages for its next tokens, those of younger rows if need be."""
        if self.pool is None:
            return True
        while (found := self.pool.take(row.pages_for(count))) is None:
            younger = self.running[-1]
            if younger is row:
                if len(self.running) > 1:
                    self._send_back(row)
                return False
            planned[:] = [piece for piece in planned if piece.row is not younger]
            self._send_back(younger)
        row.pages += found
        return True

    def _send_back(self, row: Row) -> None:
        self.running.remove(row)
        self._let_go(row)
        self.waiting.appendleft(row)

    def _let_go(self, row: Row) -> None:
        pages, row.state = row.forget_pages(), None
        if self.pool is not None:
            self.pool.let_go(pages)

    def _admit(self, row: Row, left: int) -> bool:
        """Give a waiting row what of its text is known already, and the pages for its first piece."""
        if self.pool is None:
            return True
        if not row.pages:
            known = self.pool.shared(_shareable(row))
            row.pages, row.computed = known, len(known) * PAGE
        found = self.pool.take(row.pages_for(min(row.pending, left)))
        if found is None:
            self.pool.let_go(row.forget_pages())
            return False
        row.pages += found
        return True


def _shareable(row: Row) -> list[bytes]:
    """The keys of its full pages, short of its last token: that has to be computed for what comes next."""
    return page_keys(row.owner, row.ids[:-1])
