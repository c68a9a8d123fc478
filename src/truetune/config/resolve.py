"""From defaults, a YAML file and flags to one frozen config that knows where each value came from."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml
from pydantic import ValidationError

from truetune.config.options import Options, aliases_of, group_of
from truetune.errors import ConfigError, nearest

C = TypeVar("C", bound=Options)


@dataclass(frozen=True)
class Resolved(Generic[C]):
    """A config, and for each field ``default``, ``file`` or ``flag``."""

    config: C
    sources: Mapping[str, str]

    def to_yaml(self) -> str:
        """The whole config, nested by group, each value with its source as a comment; readable by ``--config``."""
        groups: dict[str, list[str]] = {}
        for name, info in type(self.config).model_fields.items():
            value = getattr(self.config, name)
            plain = list(value) if isinstance(value, tuple) else value
            text = yaml.safe_dump([plain], default_flow_style=True, allow_unicode=True, width=10_000).strip()[1:-1]
            groups.setdefault(group_of(info), []).append(f"  {name}: {text}  # {self.sources[name]}")
        return "".join(f"{group}:\n" + "\n".join(lines) + "\n" for group, lines in groups.items())


def spellings(config_class: type[Options]) -> dict[str, str]:
    """Every accepted key in snake case → the field it means."""
    names = {name: name for name in config_class.model_fields}
    for name, info in config_class.model_fields.items():
        names |= dict.fromkeys(aliases_of(info), name)
    return names


def resolve(config_class: type[C], *, file: str | None, flags: Mapping[str, Any]) -> Resolved[C]:
    """Merge, lowest first: defaults, the YAML file, the flags.

    Raises:
        ConfigError: unknown key, wrong value, missing setting; all of them at once, each with its way out.
    """
    from_file = read_yaml(Path(file), config_class) if file else {}
    values = {**from_file, **flags}
    try:
        config = config_class(**values)
    except ValidationError as error:
        raise explain(error, config_class, from_file=set(from_file) - set(flags), file=file) from None
    sources = {n: "flag" if n in flags else "file" if n in from_file else "default" for n in config_class.model_fields}
    return Resolved(config, sources)


def read_yaml(path: Path, config_class: type[Options]) -> dict[str, Any]:
    """Read a config file: keys as the flags spell them, flat or nested under their group."""
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except FileNotFoundError:
        siblings = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise ConfigError(
            f"--config: there is no file {path}", ("did you mean", nearest(path.name, siblings))
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config: {path} can't be read as YAML: {' '.join(str(error).split())}") from None
    if node is None:
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path}: a config is a mapping of keys to values", ("for example", "model: path/to/model"))
    values: dict[str, Any] = {}
    _collect(node, path, config_class, values)
    return values


def _collect(node: yaml.MappingNode, path: Path, config_class: type[Options], values: dict[str, Any]) -> None:
    names = spellings(config_class)
    groups = {group_of(info) for info in config_class.model_fields.values()}
    for key_node, value_node in node.value:
        key = str(key_node.value).replace("-", "_")
        where = f"{path}:{key_node.start_mark.line + 1}"
        if key in groups and isinstance(value_node, yaml.MappingNode):
            _collect(value_node, path, config_class, values)
        elif key not in names:
            raise ConfigError(f"{where}: unknown key '{key_node.value}'", ("did you mean", nearest(key, names)))
        elif names[key] in values:
            raise ConfigError(f"{where}: '{key_node.value}' is set twice", ("way out", "keep one of the two lines"))
        else:
            values[names[key]] = yaml.SafeLoader("").construct_object(value_node, deep=True)


def explain(
    error: ValidationError,
    config_class: type[Options],
    *,
    from_file: Set[str] = frozenset(),
    file: str | None = None,
) -> ConfigError:
    """Word pydantic's findings as flags: what was found, what was expected, how to say it."""
    lines, seen = [], set()
    for item in error.errors():
        name = str(item["loc"][0]) if item["loc"] else ""
        if name in seen:
            continue
        seen.add(name)
        lines.append(_sentence(name, item, config_class, where=f"{file}: " if name in from_file else ""))
    return ConfigError("\n       ".join(lines), ("help", "truetune COMMAND --help lists every setting"))


def _sentence(name: str, item: Any, config_class: type[Options], *, where: str) -> str:
    flag = f"{where}--{name.replace('_', '-')}"
    kind, context = item["type"], item.get("ctx", {})
    if kind == "missing":
        info = config_class.model_fields[name]
        return f"{flag} is required: {info.description}"
    if kind == "value_error" and not name:
        return str(context["error"])
    if kind == "extra_forbidden":
        close = nearest(name, spellings(config_class))
        return f"unknown setting '{name}'" + (f"; did you mean '{spellings(config_class)[close]}'?" if close else "")
    if kind == "literal_error":
        close = nearest(str(item["input"]), str(context["expected"]).replace("'", "").replace(" or ", ", ").split(", "))
        hint = f"; did you mean '{close}'?" if close else ""
        return f"{flag}: found '{item['input']}', expected {context['expected']}{hint}"
    return f"{flag}: found {item['input']!r}, expected {_expectation(item)}"


def _expectation(item: Any) -> str:
    words = {
        "int_parsing": "a whole number",
        "int_from_float": "a whole number",
        "float_parsing": "a number",
        "bool_parsing": "true or false",
        "string_type": "a text",
        "tuple_type": "a list",
    }
    message = str(item["msg"])
    return words.get(item["type"], message.removeprefix("Value error, ").removeprefix("Input should be "))
