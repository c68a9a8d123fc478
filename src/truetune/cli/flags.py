"""A command's parser, made from its config class: no flag is declared a second time."""

from __future__ import annotations

import argparse
import types
from collections.abc import Sequence
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from truetune.config.options import Options, aliases_of, group_of
from truetune.config.resolve import spellings
from truetune.errors import ConfigError, nearest

_TITLES = {
    "base": "the model",
    "dataset": "the data",
    "tuning": "the method",
    "training": "the training",
    "run": "the run",
}


class _Parser(argparse.ArgumentParser):
    """argparse, with our errors: they name the nearest flag and never print the whole usage."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message, ("help", f"{self.prog} --help lists every setting"))


class _Formatter(argparse.HelpFormatter):
    """One spelling a flag; the others stand in its help line."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=110)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or isinstance(action, argparse._HelpAction):
            return super()._format_action_invocation(action)
        if isinstance(action, argparse.BooleanOptionalAction):
            return f"--[no-]{action.option_strings[0][2:]}"
        return f"{action.option_strings[0]} {action.metavar}" if action.metavar else action.option_strings[0]


def parse(name: str, config_class: type[Options], argv: Sequence[str]) -> tuple[dict[str, Any], str | None, bool]:
    """``(flags that were given, --config, --json)``.

    Raises:
        ConfigError: an unknown flag, or one without its value.
    """
    parser = build_parser(name, config_class)
    known, rest = parser.parse_known_args(list(argv))
    if rest:
        raise _unknown(name, config_class, rest)
    values = {key: value for key, value in vars(known).items() if value is not None}
    config_file, as_json = values.pop("config_file", None), bool(values.pop("as_json", False))
    return values, config_file, as_json


def build_parser(name: str, config_class: type[Options]) -> argparse.ArgumentParser:
    """The parser of one command; every default is None, so that what was given can be told from what was not."""
    parser = _Parser(
        prog=f"truetune {name}",
        description=(config_class.__doc__ or "").split("\n")[0],
        allow_abbrev=False,
        usage=f"truetune {name} {_usage(config_class)}",
        formatter_class=_Formatter,
    )
    headings = {group_of(info) for info in config_class.model_fields.values()}
    groups: dict[str, Any] = {h: parser.add_argument_group(t) for h, t in _TITLES.items() if h in headings}
    for field, info in config_class.model_fields.items():
        heading = group_of(info)
        if field in config_class.positional:
            groups[heading].add_argument(field, nargs="?", metavar=field.upper(), help=_help(info))
        groups[heading].add_argument(*_names(field, info), dest=field, default=None, help=_help(info), **_kind(info))
    general = parser.add_argument_group("general")
    general.add_argument("--config", dest="config_file", metavar="FILE.yaml", help="settings from a file; flags win")
    general.add_argument(
        "--json", dest="as_json", action="store_true", help="one JSON object as the last line of stdout"
    )
    return parser


def _names(field: str, info: FieldInfo) -> list[str]:
    names = [name for name in (field, *aliases_of(info)) if len(name) > 1]
    return list(dict.fromkeys(f"--{name.replace('_', '-')}" for name in names))


def _usage(config_class: type[Options]) -> str:
    """The required settings, then the rest in brackets."""
    required = [(name, info) for name, info in config_class.model_fields.items() if info.is_required()]
    words = [n.upper() if n in config_class.positional else f"--{n} {_kind(i).get('metavar')}" for n, i in required]
    return " ".join([*words, "[settings]"])


def _kind(info: FieldInfo) -> dict[str, Any]:
    """How argparse should read a field; the value itself is checked by the config class alone."""
    annotation = _plain(info.annotation)
    if annotation is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(annotation) is tuple:
        return {"action": "extend", "nargs": "+", "metavar": "X …"}
    if get_origin(annotation) is Literal:
        return {"metavar": "|".join(map(str, get_args(annotation)))}
    return {"metavar": {int: "N", float: "X"}.get(annotation, "TEXT")}


def _plain(annotation: Any) -> Any:
    """``X`` of ``X | None``."""
    if get_origin(annotation) in (Union, types.UnionType):
        return next(arg for arg in get_args(annotation) if arg is not type(None))
    return annotation


def _help(info: FieldInfo) -> str:
    text = (info.description or "").replace("%", "%%")
    default = info.default
    also = [f"--{name.replace('_', '-')}" for name in aliases_of(info) if len(name) > 1]
    text += f" [also {', '.join(also)}]" if also else ""
    if info.is_required() or default in (None, "", (), False) or "default" in text:
        return text
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
    return f"{text} (default: {shown})"


def _unknown(name: str, config_class: type[Options], rest: Sequence[str]) -> ConfigError:
    flag = next((word for word in rest if word.startswith("-")), rest[0])
    known = ["--" + key.replace("_", "-") for key in spellings(config_class)] + ["--config", "--json", "--help"]
    what = f"unknown flag {flag.split('=')[0]}" if flag.startswith("-") else f"'{flag}' belongs to no flag"
    return ConfigError(
        what,
        ("did you mean", nearest(flag.split("=")[0], known)),
        ("help", f"truetune {name} --help lists every setting"),
    )
