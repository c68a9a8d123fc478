"""Processes that stay and are asked by turns: an operation of some milliseconds can't pay for a process of its own."""

from __future__ import annotations

import json
import statistics
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from bench.measure import LONGEST
from bench.runs import ROOT, FailedRunError

Answers = dict[str, list[dict[str, Any]]]
"""System → its answers, one per round."""


class Worker(AbstractContextManager["Worker"]):
    """One system, listening; ``bench/peers/answers.py`` is the other end.

    Args:
        folder: what it says on stderr is kept here.
    """

    def __init__(self, name: str, command: Sequence[str], env: Mapping[str, str], folder: Path) -> None:
        self.name = name
        folder.mkdir(parents=True, exist_ok=True)
        self._said = folder / f"{name}.txt"
        with self._said.open("wb") as said:
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=dict(env), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said,
                text=True, bufsize=1,
            )  # fmt: skip

    def ask(self, job: str, of: Mapping[str, Any], *, seconds: float) -> dict[str, Any]:
        """Measure once.

        Raises:
            FailedRunError: it ended instead of answering; the text is what it said last.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        stuck = threading.Timer(LONGEST, self._process.kill)
        stuck.start()
        try:
            self._process.stdin.write(json.dumps({"job": job, "of": of, "seconds": seconds}) + "\n")
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            stuck.cancel()
        if not line:
            lines = self._said.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise FailedRunError(f"{self.name} ended at {job} {dict(of)}\n" + "\n".join(lines[-5:]))
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __exit__(self, *_: object) -> None:
        # Not close(): flushing into a process that has ended would raise in place of what it died of.
        self._process.kill()
        self._process.communicate()


Asked = tuple[Worker, str, Mapping[str, Any]]
"""Who, for which job, with which arguments."""


def by_turns(
    asked: Mapping[str, Asked],
    *,
    rounds: int,
    seconds: float,
    not_run: dict[str, str],
    told: Callable[[int, str, dict[str, Any]], None] = lambda turn, system, answer: None,
) -> Answers:
    """Ask every system once per round, one after the other.

    Args:
        not_run: systems that have failed, and why. They are left out, and those that fail now are added.
        told: called with the round (from 1), the system and its answer.
    """
    answers: Answers = {system: [] for system in asked if system not in not_run}
    for turn in range(1, rounds + 1):
        for system in list(answers):
            worker, job, of = asked[system]
            try:
                answer = worker.ask(job, of, seconds=seconds)
            except FailedRunError as error:
                not_run[system] = str(error)
                del answers[system]
                continue
            answers[system].append(answer)
            told(turn, system, answer)
    return answers


def seconds_of(answers: Answers) -> dict[str, float]:
    """System → the median over the rounds."""
    return {system: statistics.median(one["seconds"] for one in rounds) for system, rounds in answers.items()}
