"""``truetune generate --input``: the rows of a file and their answers, as many as there are at a time.

Rows are written as they are done, each in one line with its number in the input; a run that was cut short is gone on
with by the same command.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from truetune.config.generate import GenerateConfig
from truetune.errors import OutputError, StoppedError, TruetuneError, counted, why_unread
from truetune.generate.engine import Engine
from truetune.generate.request import Handle, Request
from truetune.recipes.generate_input import Job, Jobs
from truetune.train.log import Screen
from truetune.train.stop import StopRequest

if TYPE_CHECKING:
    from truetune.recipes.generate import Speaker


def run(
    config: GenerateConfig, jobs: Jobs, speaker: Speaker, screen: Screen, *, form: str | None = None
) -> dict[str, Any]:
    """Answer what is left to do.

    Args:
        form: the grammar of the answers.
    Raises:
        ConfigError: no answer can have that form.
        StoppedError: a signal came; what was done is in the file.
        OutputError: the file can't be written.
    """
    from truetune.recipes.generate import check_prompt, engine_of, request_for

    kept = jobs.total - len(jobs.todo)
    screen.say("rows", counted(jobs.total, "row") + (f" · {kept:,} answered before" if kept else ""))
    engine, began, tokens = engine_of(config, speaker, rows=config.rows), time.perf_counter(), 0
    grammar, failed, done = None if form is None else engine.grammars.read(form), jobs.failed, 0

    def ask(job: Job) -> Request:
        ids = speaker.conversation_ids(job.turns, config.system)
        check_prompt(ids, speaker, f"row {job.number}")
        return request_for(config, speaker, ids, grammar=grammar)

    with _appending(jobs.output) as write, screen.bar("answering") as bar, StopRequest() as stop:
        for job, answer in _answered(config, jobs.todo, ask, engine):
            failed += "error" in answer
            tokens, done = tokens + answer["new_tokens"], done + 1
            write({"row": job.number, **job.shown, **answer, "setup": jobs.setup})
            bar(kept + done, jobs.total)
            if stop.signal is not None:
                raise StoppedError(
                    stop.signal, f"stopped with {kept + done:,} of {counted(jobs.total, 'row')} answered",
                    ("way out", "the same command goes on where it stopped"),
                )  # fmt: skip
    speed = round(tokens / max(time.perf_counter() - began, 1e-9), 2)
    screen.say("done", f"{jobs.output}: {counted(done, 'row')}, {counted(tokens, 'token')} · {speed:,.1f} tok/s")
    if failed:
        screen.warn(f"{counted(failed, 'row has', 'rows have')} an error in place of an answer")
    return {"output": str(jobs.output), "rows": jobs.total, "answered": done, "kept": kept, "failed": failed,
            "new_tokens": tokens, "tok_s": speed}  # fmt: skip


@contextlib.contextmanager
def _appending(output: Path) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """What adds a row to a file, whole. Raises OutputError: it can't be written."""

    def refused(error: OSError) -> OutputError:
        return OutputError(f"--output: {output} can't be written: {why_unread(error)}")

    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        file = output.open("a", encoding="utf-8", newline="\n")
    except OSError as error:
        raise refused(error) from None

    def write(row: Mapping[str, Any]) -> None:
        try:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
        except OSError as error:
            raise refused(error) from None

    with file:
        yield write


def _answered(
    config: GenerateConfig, todo: list[Job], ask: Callable[[Job], Request], engine: Engine
) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Rows as they are done, with what is written beside them; no more are asked for than are computed together."""
    waiting, open_ = iter(todo), list[tuple[Job, Handle, dict[str, Any]]]()
    while True:
        while len(open_) < 2 * config.rows and (job := next(waiting, None)) is not None:
            try:
                request = ask(job)
                answer: dict[str, Any] = {"answer": "", "new_tokens": 0, "stopped": False,
                                          "prompt_tokens": len(request.prompt_ids)}  # fmt: skip
                open_.append((job, engine.submit(request, on_delta=_into(answer)), answer))
            except TruetuneError as error:
                yield job, {"answer": "", "new_tokens": 0, "stopped": False, "error": error.message}
        if not open_:
            return
        engine.step()
        ended = [entry for entry in open_ if entry[2].pop("ended", False)]
        open_ = [entry for entry in open_ if entry not in ended]
        yield from ((job, answer) for job, _, answer in ended)


def _into(answer: dict[str, Any]) -> Any:
    def add(delta: Any) -> None:
        answer["answer"] += delta.text
        answer["new_tokens"] += len(delta.ids)
        if delta.finish is not None:
            answer["stopped"], answer["ended"] = delta.finish == "stop", True
            if delta.error:
                answer["error"] = delta.error

    return add
