"""The rows of ``truetune generate --input``, and which of them ``--output`` has answers to."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from truetune.checkpoint.atomic import sha256, write_text
from truetune.config.generate import GenerateConfig
from truetune.data.formats import alpaca
from truetune.data.formats.checks import RowError
from truetune.data.read_json import not_utf8, words
from truetune.data.schema import Message
from truetune.errors import DataError, OutputError, beside, why_unread
from truetune.models import load
from truetune.models.weights import fingerprint
from truetune.recipes.adapter_base import identity_of
from truetune.train.log import whole_rows

_SETTINGS_ALONE = {"model", "adapter", "prompt", "input", "output", "json_schema", "rows"}  # these change no answer


OURS = ("row", "answer", "new_tokens", "stopped", "prompt_tokens", "error", "setup")
"""What stands beside a row's own columns in the output."""


@dataclass(frozen=True)
class Job:
    """A row to answer."""

    number: int  # from 1, as an editor counts lines
    row: dict[str, Any]
    turns: list[Message]

    @property
    def shown(self) -> dict[str, Any]:
        """Its columns beside the answer; one with a name of ours becomes ``given_…``, as a set's own answers do."""
        return {f"given_{name}" if name in OURS else name: value for name, value in self.row.items()}


@dataclass(frozen=True)
class Jobs:
    """What there is to do.

    Attributes:
        setup: stands in each answer's row: whatever else the same rows were asked gives another one.
    """

    todo: list[Job]
    total: int
    output: Path
    setup: str
    failed: int  # of those that are done, rows with an error in place of an answer


def setup_of(config: GenerateConfig, form: str | None) -> str:
    """12 hexadecimal digits of what decides the answers: base, adapters, settings and the form asked for."""
    settings = config.model_dump(mode="json", exclude=_SETTINGS_ALONE)
    if (template := Path(config.template).expanduser()).is_file():
        settings["template"] = sha256(template)
    base = fingerprint(load.local_copy(config.model, revision=config.revision))
    folders = [Path(folder).expanduser() for folder in config.weights]
    weights = [str(weight) for weight in config.weights.values()]
    text = json.dumps([base, identity_of(folders, " ".join(weights)), settings, form], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def read(path: Path, output: Path, *, setup: str) -> Jobs:
    """The rows of ``path`` that ``output`` lacks.

    Raises:
        DataError: no such file, nothing in it, or a row that is no prompt; named by file and row.
        OutputError: ``output`` holds something else than answers to these rows by this setup.
    """
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except OSError as error:
        found = f"--input: {path} can't be read: {why_unread(error)}"
        raise DataError(found, ("did you mean", "" if path.exists() else beside(path))) from None
    except UnicodeDecodeError as error:
        row = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, row {row}: {not_utf8(error.object, error.start)}",
            ("way out", "if the file is Latin-1: iconv -f latin1 -t utf-8 FILE > NEW"),
        ) from None
    jobs = [_job(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not jobs:
        raise DataError(f"--input: {path} has no rows", ("expected", '{"prompt": "…"} in each line'))
    done = _done(output, {job.number: job for job in jobs}, setup)
    return Jobs([job for job in jobs if job.number not in done], len(jobs), output, setup, sum(done.values()))


def _job(path: Path, number: int, line: str) -> Job:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        array = number == 1 and line.lstrip().startswith("[")
        raise DataError(
            f"{path}, row {number}: not valid JSON: {words(error)}",
            ("expected", "JSON lines, one row in each, and not one array of them" if array else ""),
        ) from None
    try:
        json.dumps(row, ensure_ascii=False).encode()  # half of a surrogate pair is no text, and can't be written
        return Job(number, row, _turns(row))
    except UnicodeEncodeError as error:
        half = error.object[error.start : error.end].encode("ascii", "backslashreplace").decode()
        raise DataError(f"{path}, row {number}: {half} is half of a character, and no text") from None
    except (RowError, ValueError) as error:
        raise DataError(
            f"{path}, row {number}: {error}",
            ("expected", '{"prompt": "…"}, {"instruction": "…"}, or {"messages": [{"role": "user", "content": "…"}]}'),
        ) from None


def _turns(row: Any) -> list[Message]:
    """The conversation that is to be answered. Raises RowError, ValueError: there is none."""
    if isinstance(row, list):
        raise ValueError("a list of rows: there should be one row a line, and not one array of them")
    if not isinstance(row, dict):
        raise ValueError("no prompt")
    if isinstance(text := row.get("prompt"), str):
        return [Message("user", text, instruction=text, input="")]
    if "instruction" in row:
        return alpaca.asked(row)
    turns = row.get("messages")
    if not (turns and isinstance(turns, list) and all(map(_is_turn, turns))):
        raise ValueError("no prompt")
    if turns[-1]["role"] == "assistant":
        raise ValueError("it ends with an answer, and asks for none")
    return [Message(turn["role"], turn["content"]) for turn in turns]


def _is_turn(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


def _done(output: Path, jobs: dict[int, Job], setup: str) -> dict[int, bool]:
    """The numbers of the rows that are answered, and whether by an error; a line cut short by a kill is taken off."""
    kept = whole_rows(output)
    done = {}
    for line in kept:
        try:
            found = json.loads(line)
            # As text, in which NaN equals itself.
            same = all(json.dumps(found.get(k)) == json.dumps(v) for k, v in jobs[found["row"]].shown.items())
        except (ValueError, KeyError, TypeError):
            same = False
        if not same:
            raise OutputError(
                f"--output: {output} holds something else than answers to these rows",
                ("way out", "another --output, or remove it"),
            )
        if found.get("setup") != setup:
            raise OutputError(
                f"--output: {output} holds answers of another model, adapter, template or other settings",
                ("way out", "another --output; or the command that began it, which goes on where it stopped"),
            )
        done[found["row"]] = "error" in found
    if output.exists() and output.stat().st_size != sum(len(line.encode()) for line in kept):
        write_text(output, "".join(kept))
    return done
