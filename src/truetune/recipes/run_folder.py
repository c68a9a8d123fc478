"""The run's folder: whose it is, and whether this run may go on in it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from truetune.checkpoint import run_state
from truetune.checkpoint.atomic import write_text, writing
from truetune.checkpoint.disk import LOCK, alone, existing
from truetune.config.resolve import Resolved
from truetune.config.sft import TrainConfig
from truetune.errors import CheckpointError, OutputError
from truetune.recipes.resume import check_settings
from truetune.train.log import Screen


@dataclass(frozen=True)
class RunFolder:
    """An opened run folder, and the checkpoint to go on from."""

    path: Path
    checkpoint: Path | None

    @property
    def log(self) -> Path:
        """One JSON row per logged step."""
        return self.path / "log.jsonl"


def open_run(resolved: Resolved[Any], screen: Screen) -> RunFolder:
    """Check that the run may write where it wants to, and find what it resumes from. Creates nothing yet.

    Raises:
        OutputError: another run's folder, some other folder, or one that can't be written.
        CheckpointError: resuming with settings that would make it another run.
    """
    config: TrainConfig = resolved.config
    path = Path(config.out).expanduser()
    _check_writable(path)
    given = _given(config)
    if _is_empty(path):
        return RunFolder(path, given)
    if not (path / "run.yaml").is_file():
        raise OutputError(
            f"--out: {config.out} is no run of truetune, and it is not empty",
            ("way out", f"--out {_free_name(path)}, or empty the folder"),
        )
    if config.resume is None:
        raise OutputError(
            f"--out: {config.out} holds another run already",
            ("way out", f"--resume auto goes on with it; --out {_free_name(path)} starts a new one beside it"),
        )
    check_settings(path, config)
    if given is not None:
        return RunFolder(path, given)
    checkpoint, damaged = run_state.newest(path)
    for folder in damaged:
        screen.warn(f"{folder} is not complete and is passed over")
    if checkpoint is None:
        screen.say("resume", "there is no checkpoint yet: the run starts from the beginning")
    return RunFolder(path, checkpoint)


@contextlib.contextmanager
def locked(folder: RunFolder) -> Iterator[None]:
    """Hold the folder against a second process that would go on with the same run at the same time.

    Raises:
        OutputError: another process is at work there.
    """
    with writing(folder.path):
        folder.path.mkdir(parents=True, exist_ok=True)
    refusal = OutputError(
        f"--out: another process is training in {folder.path}",
        ("way out", f"wait for it or stop it; --out {_free_name(folder.path)} starts a run beside it"),
    )
    with alone(folder.path, refusal):
        yield


def start(folder: RunFolder, resolved: Resolved[Any]) -> None:
    """Create the folder and write ``run.yaml``."""
    for left in (*folder.path.glob(".*.tmp-*"), *folder.path.glob("data/.*.tmp-*")):  # by a run that was killed
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)
    # First of all files: without it, a folder is not known as a run's.
    write_text(folder.path / "run.yaml", resolved.to_yaml())
    with writing(folder.path):
        (folder.path / "data").mkdir(exist_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def _given(config: TrainConfig) -> Path | None:
    if config.resume in (None, "auto"):
        return None
    path = Path(str(config.resume)).expanduser()
    if not (path / "state.json").is_file():
        raise CheckpointError(
            f"--resume: {config.resume} is no checkpoint of truetune",
            ("expected", "auto, or a folder like out/checkpoints/step-000100"),
        )
    run_state.check_whole(path)
    home = path.resolve().parent.parent
    if (home / "run.yaml").is_file():
        check_settings(home, config)
    return path


def _is_empty(path: Path) -> bool:
    """Nothing there, or only what a run leaves that was killed while it wrote its very first file."""
    return not path.exists() or all(entry.name.startswith((LOCK, ".run.yaml.tmp-")) for entry in path.iterdir())


def _check_writable(path: Path) -> None:
    parent = existing(path)
    if not parent.is_dir():
        raise OutputError(f"--out: {parent} is a file, not a folder", ("way out", "choose another --out"))
    # Asking for permission is not enough on read-only and network disks: try it.
    probe = parent / f".truetune-probe-{os.getpid()}"
    try:
        with writing(path):
            probe.touch()
            probe.unlink()
    except OSError as error:  # each kind of disk has refusals of its own
        raise OutputError(
            f"--out: nothing can be written in {parent}: {error.strerror}", ("way out", "choose another --out")
        ) from None


def _free_name(path: Path) -> str:
    if not path.name:  # . and / have none that a number could be added to
        path = path.resolve() if path.resolve().name else path / "run"
    number = 2
    while (candidate := path.with_name(f"{path.name}-{number}")).exists():
        number += 1
    return str(candidate)
