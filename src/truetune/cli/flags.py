"""A command's parser, made from its config class: no flag is declared a second time."""

from __future__ import annotations

import argparse
import re
import textwrap
import types
from collections.abc import Sequence
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from truetune.config.options import Options, aliases_of, spellings
from truetune.errors import ConfigError, nearest

# What most come for, at the head of its group.
_FIRST = ("model", "path", "run", "revision", "dtype", "device", "data", "method", "rank", "alpha", "dropout",
          "targets", "adapter", "adapters", "out")  # fmt: skip
_LONGEST = 60  # characters of choices in the place of a value
_TITLES = {
    "base": "the model",
    "dataset": "the data",
    "tuning": "the method",
    "training": "the training",
    "run": "the run",
    "server": "the server",
    "limits": "what clients may take",
}


class _Parser(argparse.ArgumentParser):
    """argparse, with our errors: they say what to type and never print the whole usage."""

    def error(self, message: str) -> NoReturn:
        raise _reword(message, self.prog)


class _Formatter(argparse.HelpFormatter):
    """One spelling a flag; the others stand in its help line."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=110)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)  # or a flag would be cut in two

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or isinstance(action, argparse._HelpAction):
            return super()._format_action_invocation(action)
        if isinstance(action, argparse.BooleanOptionalAction):
            return f"--[no-]{action.option_strings[0][2:]}"
        return f"{action.option_strings[0]} {action.metavar}" if action.metavar else action.option_strings[0]


def parse(name: str, config_class: type[Options], argv: Sequence[str]) -> tuple[dict[str, Any], str | None, bool]:
    """``(flags that were given, --config, --json)``; of a flag given twice the last one counts, of a list all do.

    Raises:
        ConfigError: an unknown flag, or one without its value.
    """
    parser = build_parser(name, config_class)
    known, rest = parser.parse_known_intermixed_args(list(argv))  # a list without a flag may stand among the flags
    if rest:
        raise _unknown(name, config_class, rest)
    values = {key: value for key, value in vars(known).items() if value is not None}
    for field in config_class.positional:
        if (bare := values.pop(f"positional_{field}", None)) not in (None, []):
            values[field] = bare
    config_file, as_json = values.pop("config_file", None), bool(values.pop("as_json", False))
    return values, config_file, as_json


def build_parser(name: str, config_class: type[Options]) -> argparse.ArgumentParser:
    """The parser of one command; every default is None, so that what was given can be told from what was not."""
    about = (config_class.__doc__ or "").split("\n")[0].partition(": ")[2]
    parser = _Parser(
        prog=f"truetune {name}",
        description=about[:1].upper() + about[1:],
        allow_abbrev=False,
        usage=f"truetune {name} {_usage(config_class)}",
        formatter_class=_Formatter,
    )
    groups = _groups(parser, config_class)
    for field in sorted(
        config_class.model_fields, key=lambda name: _FIRST.index(name) if name in _FIRST else len(_FIRST)
    ):
        info, heading = config_class.model_fields[field], config_class.heading(field)
        if field in config_class.positional:
            many = get_origin(_plain(info.annotation)) is tuple
            groups[heading].add_argument(
                f"positional_{field}", nargs="*" if many else "?", metavar=field.upper(), help=_help(info)
            )
        text = argparse.SUPPRESS if field in config_class.positional else _help(info)
        groups[heading].add_argument(*_names(field, info), dest=field, default=None, help=text, **_kind(info))
    general = parser.add_argument_group("general")
    general.add_argument("--config", dest="config_file", metavar="FILE.yaml", help="settings from a file; flags win")
    general.add_argument(
        "--json", dest="as_json", action="store_true", help="when done, one JSON object as the last line of stdout"
    )
    return parser


def _groups(parser: argparse.ArgumentParser, config_class: type[Options]) -> dict[str, Any]:
    """Heading → its part of the parser: those with a title as these stand, then those in words of their own."""
    headings = dict.fromkeys(config_class.heading(field) for field in config_class.model_fields)
    titled = [heading for heading in _TITLES if heading in headings]
    in_words = [heading for heading in reversed(headings) if heading not in _TITLES]  # the last base's come first
    return {heading: parser.add_argument_group(_TITLES.get(heading, heading)) for heading in [*titled, *in_words]}


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
        of = get_args(annotation)[0]
        return {"action": "extend", "nargs": "+", "metavar": f"{_choices(of) or 'X'} …"}
    return {"metavar": _choices(annotation) or {int: "N", float: "X"}.get(annotation, "TEXT")}


def _choices(annotation: Any) -> str:
    """``a|b|c``; where that would not fit on a line the help tells them."""
    joined = "|".join(map(str, get_args(annotation))) if get_origin(annotation) is Literal else ""
    return joined if len(joined) <= _LONGEST else "NAME"


def _plain(annotation: Any) -> Any:
    """``X`` of ``X | None``."""
    if get_origin(annotation) in (Union, types.UnionType):
        return next(arg for arg in get_args(annotation) if arg is not type(None))
    return annotation


def _help(info: FieldInfo) -> str:
    text = (info.description or "").replace("%", "%%")
    if _kind(info).get("metavar") == "NAME":
        text += f"; one of {', '.join(map(str, get_args(_plain(info.annotation))))}"
    default = info.default
    also = [f"--{name.replace('_', '-')}" for name in aliases_of(info) if len(name) > 1]
    text += f" [also {', '.join(also)}]" if also else ""
    if info.is_required() or default is None or default is False or default in ("", ()) or "(default" in text:
        return text
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else "yes" if default is True else default
    return f"{text} (default: {f'{shown:g}' if isinstance(shown, float) else shown})"


def _unknown(name: str, config_class: type[Options], rest: Sequence[str]) -> ConfigError:
    flag = next((word for word in rest if word.startswith("-")), rest[0]).split("=")[0]
    known = [option for action in build_parser(name, config_class)._actions for option in action.option_strings]
    known += [f"--{key}" for key in spellings(config_class) if len(key) == 1]
    return ConfigError(
        f"unknown flag {flag}" if flag.startswith("-") else f"'{flag}' belongs to no flag",
        ("did you mean", nearest(flag, known) if flag.startswith("--") else ""),
        ("help", f"truetune {name} --help lists every setting"),
    )


def _reword(message: str, prog: str) -> ConfigError:
    """argparse's sentence about one flag, as ours."""
    found = re.match(r"argument ([^:]+): (.*)", message, re.DOTALL)
    if not found:
        return ConfigError(message, ("help", f"{prog} --help lists every setting"))
    flags, complaint = found[1].split("/"), found[2]
    if complaint.startswith("expected"):
        return ConfigError(
            f"{flags[0]} needs a value",
            ("way out", f"{flags[0]} VALUE, or {flags[0]}=VALUE when the value starts with a dash"),
        )
    if complaint.startswith("ignored explicit argument"):
        both = [flag for flag in flags if flag in (flags[0], f"--no-{flags[0][2:]}")]
        return ConfigError(
            f"{flags[0]} takes no value, and {complaint.rpartition(' ')[2]} was given", ("way out", " or ".join(both))
        )
    return ConfigError(f"{flags[0]}: {complaint}", ("help", f"{prog} --help lists every setting"))
