"""Shards by all cores: processes that are given one block after another, and end with the one that started them.

Processes and not threads: a row costs more time in Python (its JSON, its template, its mask) than in the tokenizer.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

import torch

from truetune.data.shards_made import Counts, ShardMaker, Task
from truetune.errors import DataError

_maker: ShardMaker | None = None
_GARBAGE = 50_000  # objects between two looks for cycles in a process that tokenises


class WorkerDiedError(DataError):
    """A process that tokenised was ended from outside; what was finished is kept."""

    exit_code = 3


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_shards(
    maker: ShardMaker, tasks: Iterable[Task], *, workers: int, too_many: Callable[[Counts], bool]
) -> Iterator[tuple[Task, Counts]]:
    """Make all shards.

    Args:
        workers: processes; 1 makes them in this one.
        too_many: told of each finished shard; once it says True, the rest is only checked.
    Yields:
        each task with what became of it, as they are finished.
    Raises:
        WorkerDiedError: a process was killed, most likely for want of memory.
    """
    only_check = False
    if workers == 1:
        for task in tasks:
            counts = maker(task, only_check=only_check)
            only_check = only_check or too_many(counts)
            yield task, counts
        return
    with _pool(maker, workers) as pool:
        running: dict[Future[Counts], Task] = {}
        for task in tasks:
            running[pool.submit(_make, task, only_check)] = task
            if len(running) >= 2 * workers:  # more would only hold blocks in memory
                for done, counts in _finished(running):
                    only_check = only_check or too_many(counts)
                    yield done, counts
        while running:
            yield from _finished(running)


def _finished(running: dict[Future[Counts], Task]) -> list[tuple[Task, Counts]]:
    done, _ = wait(running, return_when=FIRST_COMPLETED)
    try:
        return [(running.pop(future), future.result()) for future in done]
    except BrokenProcessPool:
        raise WorkerDiedError(
            "a process that tokenises the data was killed",
            ("likely", "the machine ran out of memory"),
            ("kept", "the part that was finished: the same command goes on from there"),
            ("way out", "end other programs, or lower the number of processors it may use (taskset)"),
        ) from None


@contextlib.contextmanager
def _pool(maker: ShardMaker, workers: int) -> Iterator[ProcessPoolExecutor]:
    # A fork costs milliseconds and shares the tokenizer's memory; elsewhere it is not safe, and a start takes seconds.
    context = multiprocessing.get_context("fork" if sys.platform.startswith("linux") else "spawn")
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # read by the processes: each has one core to itself
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(maker, os.getpid()))
    try:
        yield pool
        pool.shutdown()
    except BaseException:
        processes = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:  # not asked to finish: a block takes seconds, and Ctrl-C means now
            process.kill()
        for process in processes:
            process.join()
        raise
    finally:
        if before is None:
            os.environ.pop("TOKENIZERS_PARALLELISM", None)
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _start(maker: ShardMaker, parent: int) -> None:
    """In a new process, before its first block."""
    global _maker
    _maker = maker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent ends its processes
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    # Rows make many objects and hardly a cycle: looking for one again and again took a tenth of the time.
    gc.freeze()
    gc.set_threshold(_GARBAGE)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """Leave once the process that gives out the work is gone, however it went."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _make(task: Task, only_check: bool) -> Counts:
    assert _maker is not None
    return _maker(task, only_check=only_check)
