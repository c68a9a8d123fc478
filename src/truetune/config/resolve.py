"""From defaults, a YAML file and flags to one frozen config that knows where each value came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml

from truetune.config.options import Options, group_of
from truetune.config.read_yaml import read_yaml
from truetune.config.wording import InvalidOptionsError

C = TypeVar("C", bound=Options)


@dataclass(frozen=True)
class Resolved(Generic[C]):
    """A config, for each field ``default``, ``file`` or ``flag``, and the file, if one was given."""

    config: C
    sources: Mapping[str, str]
    file: Path | None = None

    def to_yaml(self) -> str:
        """The whole config, nested by group, each value with its source as a comment; readable by ``--config``."""
        groups: dict[str, list[str]] = {}
        for name, info in type(self.config).model_fields.items():
            value = getattr(self.config, name)
            plain = list(value) if isinstance(value, tuple) else value
            groups.setdefault(group_of(info), []).append(f"  {name}: {in_yaml(plain)}  # {self.sources[name]}")
        return "".join(f"{group}:\n" + "\n".join(lines) + "\n" for group, lines in groups.items())


def in_yaml(value: Any) -> str:
    """On one line, and readable; escaped only where YAML would take a character for a line break."""
    # In brackets, because a bare text could not be told from a number, a date or a yes.
    text: str = ""
    for allow_unicode in (True, False):
        text = yaml.safe_dump([value], default_flow_style=True, allow_unicode=allow_unicode, width=float("inf"))
        if not set("\x85\u2028\u2029") & set(text):
            break
    return text.strip()[1:-1]


def resolve(config_class: type[C], *, file: str | None, flags: Mapping[str, Any]) -> Resolved[C]:
    """Merge, lowest first: defaults, the YAML file, the flags.

    A value of the file that is the default counts as not set where settings exclude each other: ``run.yaml`` spells
    every setting out, those too that its run had no use for.

    Raises:
        ConfigError: unknown key, wrong value, missing setting; all of them at once, each with its way out.
    """
    path = Path(file).expanduser() if file is not None else None
    from_file = read_yaml(path, config_class) if path is not None else {}
    values = {n: v.value for n, v in from_file.items() if not _is_default(config_class, n, v.value)} | dict(flags)
    try:
        config = config_class(**values)
    except InvalidOptionsError as error:
        where = {name: value.where for name, value in from_file.items() if name not in flags}
        raise InvalidOptionsError(error.validation, config_class, where) from None
    sources = {n: "flag" if n in flags else "file" if n in from_file else "default" for n in config_class.model_fields}
    return Resolved(config, sources, path)


def _is_default(config_class: type[Options], name: str, value: Any) -> bool:
    default = config_class.model_fields[name].default
    plain = tuple(value) if isinstance(value, list) else value
    return type(plain) is type(default) and plain == default
