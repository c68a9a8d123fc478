"""The run's folder: whose it is, and whether this run may go on in it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from truetune.checkpoint import run_state
from truetune.checkpoint.atomic import write_text, writing
from truetune.config.resolve import Resolved
from truetune.config.sft import TrainConfig
from truetune.errors import CheckpointError, OutputError
from truetune.train.log import Screen

# Settings that may differ between a run and its resumption, because they do not change what is computed.
_FREE = {"out", "resume", "keep", "save_every", "eval_every", "log_every", "dry_run", "select", "device"}


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
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return RunFolder(path, _given(config))
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
    _check_same_run(path, config)
    if config.resume != "auto":
        return RunFolder(path, _given(config))
    checkpoint, damaged = run_state.newest(path)
    for folder in damaged:
        screen.warn(f"{folder} is not complete and is passed over")
    if checkpoint is None:
        screen.say("resume", "there is no checkpoint yet: the run starts from the beginning")
    return RunFolder(path, checkpoint)


def start(folder: RunFolder, resolved: Resolved[Any]) -> None:
    """Create the folder and write ``run.yaml``."""
    with writing(folder.path):
        (folder.path / "data").mkdir(parents=True, exist_ok=True)
    write_text(folder.path / "run.yaml", resolved.to_yaml())


def read_settings(path: Path) -> dict[str, Any]:
    """The settings a run was started with, from its ``run.yaml``.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        groups = yaml.safe_load((path / "run.yaml").read_text(encoding="utf-8"))
        return {key: value for group in groups.values() for key, value in group.items()}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError):
        raise CheckpointError(
            f"{path / 'run.yaml'} can't be read, so the run in this folder can't be told",
            ("way out", "choose another --out; its checkpoints can be named with --resume DIR"),
        ) from None


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
    return path


def _check_writable(path: Path) -> None:
    parent = path
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise OutputError(f"--out: {parent} is a file, not a folder", ("way out", "choose another --out"))
    with writing(path):
        # Asking for permission is not enough on read-only and network disks: try it.
        probe = parent / f".truetune-probe-{os.getpid()}"
        probe.touch()
        probe.unlink()


def _free_name(path: Path) -> str:
    number = 2
    while (candidate := path.with_name(f"{path.name}-{number}")).exists():
        number += 1
    return str(candidate)


def _check_same_run(path: Path, config: TrainConfig) -> None:
    """Compare with ``run.yaml``: a resumed run with other settings would not be the run that was started."""
    before = read_settings(path)
    now = yaml.safe_load(yaml.safe_dump(json.loads(config.model_dump_json())))
    changed = [
        f"--{key.replace('_', '-')}: {before.get(key)!r}, now {value!r}"
        for key, value in now.items()
        if key not in _FREE and before.get(key) != value
    ]
    if changed:
        raise CheckpointError(
            f"--resume: the run in {path} was started with other settings",
            ("changed", "\n".join(changed)),
            ("way out", f"give the same settings (--config {path / 'run.yaml'}), or another --out"),
        )
