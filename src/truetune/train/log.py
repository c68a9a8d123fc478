"""What a run says: rows for machines in ``log.jsonl``, lines and a bar for people on stderr."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from typing_extensions import Self

from truetune.checkpoint.atomic import write_text, writing

# Columns that a bar takes beside its words: the share done, the shortest bar, the time left, and blanks between them.
_AROUND = 20


class Screen:
    """Labelled lines on stderr, as plain text where it is no terminal."""

    def __init__(self, *, silent: bool = False) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True, quiet=silent)

    def say(self, label: str, text: str) -> None:
        """One line: what it is about, then what there is to say."""
        self.console.print(f"[bold]{label:<8}[/bold]{escape(text)}")

    def note(self, text: str) -> None:
        """A line that belongs to the one above it."""
        self.console.print(f"        {escape(text)}")

    def warn(self, text: str) -> None:
        """Something the user should look at, though the run goes on."""
        self.console.print(f"[yellow]warning[/yellow] {escape(text)}")

    @contextlib.contextmanager
    def bar(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """A bar for one piece of work: call what is yielded with ``(done, total)``. Nothing where it is no terminal."""
        with Progress(console=self.console, transient=True, disable=not self.console.is_terminal) as progress:
            task = progress.add_task(what, total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)


class RunLog:
    """Rows of ``log.jsonl``, and the progress bar.

    On resume, rows after ``start`` are dropped first: they belong to steps that will be done again. A run that starts
    from the beginning starts an empty log.
    """

    def __init__(self, path: Path, screen: Screen, *, steps: int, start: int, every: int) -> None:
        self.path, self.screen, self.steps, self.every = path, screen, steps, every
        with writing(path.parent):
            kept = [line for line in whole_rows(path) if json.loads(line)["step"] <= start] if start else []
            write_text(path, "".join(kept))
            # Unbuffered: a row that a full disk refuses must not come back when the file is closed.
            self._file = path.open("ab", buffering=0)
        self._start, self._since, self._tokens = start, time.perf_counter(), 0
        self._bar = Progress(
            TextColumn("{task.percentage:>3.0f} %"),
            BarColumn(bar_width=28),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=screen.console,
            transient=True,
            disable=not screen.console.is_terminal,
        )
        self._task: TaskID | None = None
        self._val = ""

    def __enter__(self) -> Self:
        self._bar.start()
        self._task = self._bar.add_task("", total=self.steps, completed=self._start)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._bar.stop()
        self._file.close()

    def step(self, step: int, row: dict[str, Any]) -> None:
        """Count a finished step (from 1), and write its row when it is due; adds ``tok_s`` since the last row."""
        self._tokens += row["tokens"]
        if step % self.every == 0 or step == self.steps:
            seconds = max(time.perf_counter() - self._since, 1e-9)
            row["tok_s"] = round(self._tokens / seconds, 1)
            self._write({"step": step, **row})
            self._since, self._tokens = time.perf_counter(), 0
            self._show(step, row)

    def evaluation(self, step: int, loss: float, tokens: int) -> None:
        """Write the row of an evaluation after ``step`` steps; its time does not count into ``tok_s``."""
        self._write({"step": step, "val_loss": loss, "val_tokens": tokens})
        self._val = f"  val {loss:.4f}"
        if not self.screen.console.is_terminal:
            self.screen.note(f"step {step}/{self.steps}{self._val}")
        self._since, self._tokens = time.perf_counter(), 0

    def _write(self, row: dict[str, Any]) -> None:
        with writing(self.path.parent):
            line = (json.dumps(row) + "\n").encode()
            while line:
                line = line[self._file.write(line) :]

    def sync(self) -> None:
        """Bring all rows to the disk: a checkpoint must never be newer than its log."""
        with writing(self.path.parent):
            os.fsync(self._file.fileno())

    def _show(self, step: int, row: dict[str, Any]) -> None:
        # The bar carries the last evaluation along; a plain line stays on the screen and says only what is of its step.
        val = self._val if self.screen.console.is_terminal else ""
        text = f"step {step}/{self.steps}  loss {row['loss']:.4f}{val}  {row['tok_s']:,.0f} tok/s"
        if self._task is not None and self.screen.console.is_terminal:
            said = _fitting(f"{text}  {row['peak_mb'] / 1e3:.1f} GB", self.screen.console.width - _AROUND)
            self._bar.update(self._task, completed=step, description=said)
        elif step == self.steps or step * 10 // self.steps > (step - self.every) * 10 // self.steps:
            self.screen.note(text)


def _fitting(text: str, room: int) -> str:
    """As many of the figures as have room, from the front; the step and its loss in any case."""
    figures = text.split("  ")
    while len(figures) > 2 and len("  ".join(figures)) > room:
        figures.pop()
    return "  ".join(figures)


def whole_rows(path: Path) -> list[str]:
    """The whole lines of a log; one cut short by a kill is not a row."""
    if not path.exists():
        return []
    *lines, _ = path.read_bytes().split(b"\n")  # a line feed alone: text may hold what else Unicode calls a line's end
    return [f"{line.decode('utf-8', 'replace')}\n" for line in lines if line.endswith(b"}")]
