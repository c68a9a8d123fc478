"""A file of another program: which program's it is, and what it says."""

from __future__ import annotations

import io
import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from truetune.config.imports import axolotl, llamafactory, swift, torchtune, trl
from truetune.config.imports.rules import Program
from truetune.errors import ConfigError, nearest

PROGRAMS: Mapping[str, Program] = {
    "llamafactory": llamafactory.PROGRAM,
    "axolotl": axolotl.PROGRAM,
    "swift": swift.PROGRAM,
    "torchtune": torchtune.PROGRAM,
    "trl": trl.PROGRAM,
}
"""By what ``--from`` calls them; ``trl`` reads PEFT's files as well."""


@dataclass(frozen=True)
class Foreign:
    """What a file says, whose it is, and how many devices it was written for, where it tells."""

    program: Program
    said: Mapping[str, Any]
    devices: int | None


def read_foreign(path: Path, program: str = "auto") -> Foreign:
    """Read a YAML or JSON file, or the command line in a shell script.

    Raises:
        ConfigError: no such file, one that can't be read, or of no program that is known here.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        if path.is_dir():
            raise ConfigError(
                f"{path} is a folder", ("expected", "one file: a YAML, a JSON or a shell script")
            ) from None
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ConfigError(
            f"{path} can't be read: {error.strerror}", ("did you mean", nearest(path.name, siblings))
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text") from None
    if path.suffix in (".sh", ".bash", ".txt") or text.startswith("#!"):
        return _of_script(path, text, program)
    said = _mapping(path, text)
    found = PROGRAMS[program] if program != "auto" else _told(path, said)
    return Foreign(found, torchtune.flat(said) if found is torchtune.PROGRAM else said, None)


def _mapping(path: Path, text: str) -> dict[str, Any]:
    try:
        # JSON is YAML, but not as quickly read, and its faults are told apart better.
        said = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: neither YAML nor JSON: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(said, dict) or not said:
        raise ConfigError(f"{path}: expected keys with values, found {type(said).__name__ if said else 'nothing'}")
    return {str(key): value for key, value in said.items()}


def _told(path: Path, said: Mapping[str, Any]) -> Program:
    """The program with most of its own keys in a file."""
    keys = {*said, *torchtune.flat(said)}
    counts = {name: len(program.marks & keys) for name, program in PROGRAMS.items()}
    best = max(counts, key=counts.__getitem__)
    if not counts[best] or list(counts.values()).count(counts[best]) > 1:
        raise ConfigError(
            f"{path}: can't tell which program this config is of",
            ("found", ", ".join(list(said)[:8])),
            ("way out", f"--from {', '.join(PROGRAMS)}"),
        )
    return PROGRAMS[best]


_RUNNERS = (
    (r"(?:llamafactory-cli|llamafactory)\s+train\b", "llamafactory"),
    (r"\b(?:swift|megatron)\s+(?:sft|pt)\b", "swift"),
    (r"swift/cli/(?:sft|pt)\.py", "swift"),
    (r"\btrl\s+sft\b", "trl"),
    (r"\bsft\.py\b|\btrain\.py\b|run_sft\.py\b", "trl"),
)


def _of_script(path: Path, text: str, program: str) -> Foreign:
    """The first command line of a known program, with the variables that are set before it."""
    joined = re.sub(r"\\\s*\n", " ", text)
    lines = [line for line in joined.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    for number, line in enumerate(lines):
        for pattern, name in _RUNNERS:
            if program in ("auto", name) and (found := re.search(pattern, line)):
                said = _flags(path, line[found.end() :])
                if " pt" in found[0] or "/pt" in found[0]:
                    said["command"] = "pt"
                return Foreign(PROGRAMS[name], said, _devices("\n".join(lines[: number + 1])))
    raise ConfigError(
        f"{path}: no command line of a program that is known here",
        ("expected", "swift sft …, llamafactory-cli train …, or trl sft …"),
    )


def _flags(path: Path, text: str) -> dict[str, Any]:
    """``--key value``, ``--key=value``, ``--key a b`` and ``--switch``."""
    try:
        words = _words(text)
    except ValueError as error:
        raise ConfigError(f"{path}: the command line can't be read: {error}") from None
    said: dict[str, Any] = {}
    key = ""
    for word in words:
        if word in ("&&", "||", ";", "|", "&", ">", ">>", "2>&1"):
            break
        if word.startswith("--"):
            key, _, value = word[2:].partition("=")
            key = key.replace("-", "_")
            said[key] = value if "=" in word else True
        elif key:
            before = said[key]
            said[key] = word if before is True else [*(before if isinstance(before, list) else [before]), word]
    return said


def _words(text: str) -> list[str]:
    """As a shell has them: a ``#`` begins a comment where it begins a word, and nowhere else (``rows.jsonl#500``).

    Raises:
        ValueError: a quotation that does not end.
    """
    lexer = shlex.shlex(stream := io.StringIO(text), posix=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    found: list[str] = []
    while True:
        at = stream.tell()
        word = lexer.get_token()
        if word is None or text[at:].lstrip().startswith("#"):
            return found
        found.append(word)


def _devices(text: str) -> int | None:
    """``NPROC_PER_NODE=4``, ``CUDA_VISIBLE_DEVICES=0,1`` or ``--nproc_per_node 4``."""
    if found := re.search(r"(?:NPROC_PER_NODE=|nproc[_-]per[_-]node[ =]|num_processes[ =])[\"']?(\d+)", text):
        return int(found[1])
    if found := re.search(r"CUDA_VISIBLE_DEVICES=[\"']?([\d,]+)", text):
        return len([number for number in found[1].split(",") if number])
    return None
