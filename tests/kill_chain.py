"""Run a command in forked children of one imported process, and kill them in the middle, again and again.

    python kill_chain.py OUT KILLS SEED ARGUMENT...

Half of the kills come while a checkpoint's temporary folder is there, half after a random delay. When a run gets
through, it is compared by the caller; here it is moved to ``OUT.done-N`` and a new one starts. Prints one JSON object.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

import truetune.recipes.sft  # noqa: F401 - imported once, so that a child starts at once
from truetune.cli.main import main


def child(arguments: list[str]) -> int:
    """Start the command; returns the process id."""
    pid = os.fork()
    if pid == 0:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        os._exit(main(arguments))
    return pid


def ended(pid: int) -> int | None:
    """The exit code of a child that is over."""
    found, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def half_saved(folder: Path) -> bool:
    """Whether a checkpoint is being written at this moment."""
    try:
        return any(name.startswith(".step-") and ".tmp-" in name for name in os.listdir(folder))
    except OSError:
        return False


def wait_for_save(pid: int, folder: Path, number: int) -> int | None:
    """Return in the middle of the ``number``-th save from now, or with the exit code when the run ends before."""
    inside = True
    while True:
        now = half_saved(folder)
        number -= now and not inside
        inside = now
        if number <= 0:
            return None
        if (code := ended(pid)) is not None:
            return code


def wait(pid: int, seconds: float) -> int | None:
    """Return after so long, or with the exit code when the run ends before."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if (code := ended(pid)) is not None:
            return code
        time.sleep(0.001)
    return None


def chain(out: Path, kills: int, seed: int, arguments: list[str]) -> dict[str, int]:
    draw, counts = random.Random(seed), {"killed": 0, "in_a_save": 0, "finished": 0}
    while True:
        pid = child([*arguments, "--out", str(out), "--resume", "auto"])
        if counts["killed"] >= kills:
            code: int | None = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        elif counts["killed"] % 2:
            code = wait(pid, draw.uniform(0, 1.2))
        else:
            code = wait_for_save(pid, out / "checkpoints", draw.randint(1, 3))
        if code is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            counts["in_a_save"] += half_saved(out / "checkpoints")
            counts["killed"] += 1
            continue
        if code:
            raise SystemExit(f"the run ended with {code}")
        counts["finished"] += 1
        if counts["killed"] >= kills:
            return counts
        out.rename(out.with_name(f"{out.name}.done-{counts['finished']}"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.stdout.write(json.dumps(chain(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])) + "\n")
