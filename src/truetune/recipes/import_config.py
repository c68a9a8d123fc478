"""``truetune import-config``: another program's config as one of ours, with a line for every key."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from truetune.checkpoint.atomic import write_text
from truetune.config.import_config import ImportConfig
from truetune.config.imports.files import read_foreign
from truetune.config.imports.rules import Imported, Line, read
from truetune.config.methods import METHODS, TUNING_FIELDS
from truetune.config.options import Options, group_of
from truetune.config.resolve import Resolved, in_yaml
from truetune.config.sft import PretrainConfig, SFTConfig
from truetune.config.wording import InvalidOptionsError
from truetune.errors import OutputError
from truetune.train.log import Screen

_REQUIRED = ("model", "data")
_ORDER = ("taken", "changed", "default", "not taken", "unknown", "no effect")


def run(resolved: Resolved[ImportConfig]) -> dict[str, Any]:
    """Read, tell what became of each key, and write what is meant by them."""
    config, screen = resolved.config, Screen()
    path = Path(config.path).expanduser()
    foreign = read_foreign(path, config.source)
    devices = config.devices or foreign.devices or 1
    imported = read(foreign.program, foreign.said, devices=devices)
    config_class: type[Options] = PretrainConfig if imported.command == "pretrain" else SFTConfig
    settings, faults = _accepted(config_class, imported.settings)
    lines = [*imported.lines, *faults]
    missing = [name for name in _REQUIRED if name not in settings]
    text = _yaml(config_class, settings, imported, path.name, missing) + _left(lines)
    if config.out:
        out = Path(config.out).expanduser()
        if out.exists():
            raise OutputError(f"--out: {out} is there already", ("way out", "another --out, or remove it"))
        write_text(out, text)
    else:
        print(text, end="")  # noqa: T201 - the command's output
    # Beside a YAML on stdout, what is said about it must not get in its way.
    _show(lines, imported.program, stderr=config.out is None)
    for name in missing:
        screen.warn(f"the file does not say --{name}: add it to the YAML or to the command line")
    target = config.out or "FILE.yaml"
    screen.say("next", f"truetune {imported.command} --config {target} --dry-run")
    return {
        "program": imported.program,
        "command": imported.command,
        "out": config.out,
        "devices": devices,
        "settings": settings,
        "missing": missing,
        "lines": [asdict(line) for line in lines],
    }


def _accepted(config_class: type[Options], settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[Line]]:
    """The settings that our config takes together, and a line for each that it refuses."""
    kept, faults = dict(settings), []
    method = kept.get("method", config_class.model_fields["method"].default)
    own = METHODS[method].config.model_fields
    for name in [name for name in kept if name in TUNING_FIELDS and name not in own]:
        faults.append(Line(name, kept.pop(name), "not taken", note=f"no setting of --method {method}"))
    while True:
        placeholders = {name: "?" for name in _REQUIRED if name not in kept}
        try:
            config_class(**{**kept, **placeholders})
        except InvalidOptionsError as error:
            said = error.validation.errors()[0]
            note = str(said["msg"]).removeprefix("Value error, ")
            # What two settings are to each other is told by their flags.
            named = [str(said["loc"][0])] if said["loc"] else re.findall(r"--([a-z][a-z-]*)", note)
            name = next((n for n in (word.replace("-", "_") for word in named) if n in kept), "")
            if not name:
                raise
            if said["type"] == "extra_forbidden":
                note = f"no setting of truetune {config_class.command}"
            faults.append(Line(name, kept.pop(name), "not taken", note=note))
        else:
            return kept, faults


def _yaml(
    config_class: type[Options], settings: Mapping[str, Any], imported: Imported, name: str, missing: list[str]
) -> str:
    """Our settings by their groups, each with the key it is from."""
    origin = {part.split(" = ")[0]: line for line in imported.lines for part in line.ours.split(", ") if " = " in part}
    groups: dict[str, list[str]] = {}
    for field, info in config_class.model_fields.items():
        if field in settings:
            comment = f"  # {origin[field].theirs or origin[field].note}" if field in origin else ""
            groups.setdefault(group_of(info), []).append(f"  {field}: {in_yaml(settings[field])}{comment}")
        elif field in missing:
            groups.setdefault(group_of(info), []).append(f"  # {field}: not in {name}; give it here or as a flag")
    body = "".join(f"{group}:\n" + "\n".join(lines) + "\n" for group, lines in groups.items())
    return f"# From {imported.program}'s {name}, by truetune import-config; for truetune {imported.command}.\n{body}"


def _left(lines: list[Line]) -> str:
    """What is not among the settings, as comments, so that the file tells of it as well."""
    left = [line for line in lines if line.kind in ("not taken", "unknown")]
    said = (" ".join(f"#   {line.theirs} = {_short(line.value)}: {line.note}".split()) for line in left)
    return "".join(f"{text}\n" for text in ("# Not among them:", *said)) if left else ""


def _show(lines: list[Line], program: str, *, stderr: bool) -> None:
    stream = sys.stderr if stderr else sys.stdout
    console = Console(file=stream, highlight=False, width=None if stream.isatty() else 132)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in (program, "", "here", ""):
        table.add_column(heading, overflow="fold")
    for line in sorted(lines, key=lambda line: _ORDER.index(line.kind)):
        value = "" if line.value is None and not line.theirs else f" = {_short(line.value)}"
        mark = {"unknown": "[red]unknown[/red]", "not taken": "[yellow]not taken[/yellow]"}.get(line.kind, line.kind)
        cells = [text.replace("[", r"\[") for text in (line.theirs + value, line.ours, line.note)]
        table.add_row(cells[0], mark, *cells[1:])
    console.print(table)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
