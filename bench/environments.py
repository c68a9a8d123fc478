"""Each peer lives in a virtual environment of its own, with the versions that ``bench/peers/NAME.txt`` pins."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from bench.report import say

PEERS = Path(__file__).parent / "peers"
SCRIPTS = {"peft": "peft_trainer.py", "litgpt": "litgpt_lora.py", "ms-swift": "ms_swift.py"}
_ASK = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"


def pins(name: str) -> dict[str, str]:
    """Package → version, of those lines in the peer's file that pin one."""
    lines = (PEERS / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.strip().split("==") for line in lines if "==" in line and not line.startswith("#"))


def python_of(folder: Path, name: str) -> Path:
    """The interpreter of a peer's environment; it may not exist."""
    return folder / name / "bin" / "python"


def versions(folder: Path, name: str) -> dict[str, str] | None:
    """What is installed of the pinned packages, or None where one of them is missing."""
    return versions_in(python_of(folder, name), name)


def versions_in(python: Path, name: str) -> dict[str, str] | None:
    """The same for any interpreter."""
    if not python.exists():
        return None
    asked = subprocess.run([str(python), "-c", _ASK, *pins(name)], capture_output=True, text=True, check=False)
    found: dict[str, str] | None = json.loads(asked.stdout) if asked.returncode == 0 else None
    return found


def interpreter(folder: Path, name: str) -> Path | None:
    """The peer's own, or this one if it has what the peer pins, in whatever version; None where neither has."""
    known = (python_of(folder, name), Path(sys.executable))
    return next((python for python in known if versions_in(python, name) is not None), None)


def other_versions(name: str, found: dict[str, str]) -> list[str]:
    """Where an environment differs from the pins; a build's local part (``+cpu``) is no difference."""
    wanted = pins(name)
    return [f"{p} {v}, not {wanted[p]}" for p, v in found.items() if v.split("+")[0] != wanted[p]]


def install(folder: Path, name: str) -> None:
    """Make the environment with this interpreter; pip takes its indexes from the user's own settings.

    Where that fails, pip or venv has said why, and ``versions`` will find none.
    """
    say(f"installing {name} into {folder / name}")
    try:
        _install(folder, name)
    except subprocess.CalledProcessError as error:
        say(f"error: {name} can't be installed: {error}")


def _install(folder: Path, name: str) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(folder / name)], check=True)
    pip = [str(python_of(folder, name)), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "-r", str(PEERS / f"{name}.txt")], check=True, stdout=sys.stderr)
