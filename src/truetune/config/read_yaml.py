"""A config file: YAML whose keys are spelled as the flags are, flat or nested under their group."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from truetune.config.options import Options, group_of, spellings
from truetune.errors import ConfigError, nearest


class FileValue(NamedTuple):
    """A value and the ``file:line`` it was found at."""

    value: Any
    where: str


def read_yaml(path: Path, config_class: type[Options]) -> dict[str, FileValue]:
    """Field → what the file sets it to, without the keys that ``config_class`` passes over.

    Raises:
        ConfigError: no such file, no YAML, or keys that are unknown or there twice; all of them at once.
    """
    node = _compose(path)
    if node is None:
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path}: expected keys with values", ("for example", "model: path/to/model"))
    names, faults = spellings(config_class), []
    values: dict[str, FileValue] = {}
    other = config_class.passes_over
    ignored = spellings(other) if other else {}
    kinds = (config_class, other) if other else (config_class,)
    groups = {group_of(info) for kind in kinds for info in kind.model_fields.values()}
    for key_node, value_node in _entries(node, groups):
        said = key_node.value if isinstance(key_node, yaml.ScalarNode) else "a list or mapping"
        key = said.replace("-", "_")
        where = f"{path}:{key_node.start_mark.line + 1}"
        if key not in names and key in ignored:
            continue
        if key not in names:
            close = nearest(key, [*names, *ignored])
            faults.append(f"{where}: unknown key '{said}'" + (f"; did you mean '{close}'?" if close else ""))
        elif names[key] in values:
            faults.append(f"{where}: '{said}' is set twice, first in {values[names[key]].where}")
        else:
            values[names[key]] = FileValue(_construct(value_node, where), where)
    if faults:
        help_line = f"truetune {config_class.command} --help lists every key" if config_class.command else ""
        raise ConfigError("\n       ".join(faults), ("help", help_line))
    return values


def _compose(path: Path) -> yaml.Node | None:
    try:
        return yaml.compose(path.read_text(encoding="utf-8-sig"), Loader=yaml.SafeLoader)
    except FileNotFoundError:
        siblings = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise ConfigError(
            f"--config: there is no file {path}", ("did you mean", nearest(path.name, siblings))
        ) from None
    except OSError as error:
        raise ConfigError(f"--config: {path} can't be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config: {path} is not UTF-8 text: byte 0x{error.object[error.start]:02X}") from None
    except yaml.YAMLError as error:
        raise _not_yaml(error, str(path)) from None


def _entries(node: yaml.MappingNode, groups: set[str]) -> Iterator[tuple[yaml.Node, yaml.Node]]:
    """Keys and values, those under a group's heading too; a heading with nothing under it says nothing."""
    for key, value in node.value:
        heads = isinstance(key, yaml.ScalarNode) and key.value in groups
        if heads and isinstance(value, yaml.MappingNode):
            yield from _entries(value, groups)
        elif not (heads and value.tag == "tag:yaml.org,2002:null"):
            yield key, value


def _construct(node: yaml.Node, where: str) -> Any:
    try:
        return yaml.SafeLoader("").construct_object(node, deep=True)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        if isinstance(error, yaml.YAMLError):
            raise _not_yaml(error, where.rpartition(":")[0]) from None
        raise ConfigError(f"{where}: {error}") from None


def _not_yaml(error: yaml.YAMLError, file: str) -> ConfigError:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
    tab = "YAML indents with blanks, not tabs" if "'\\t'" in problem else ""
    where = f"{file}:{mark.line + 1}" if mark else file
    return ConfigError(f"{where}: not valid YAML: {' '.join(problem.split())}", ("way out", tab))
