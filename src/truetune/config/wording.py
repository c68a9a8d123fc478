"""What pydantic finds wrong, worded as flags: what was found, what was expected, how to say it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from truetune.config.options import Options, spellings
from truetune.errors import ConfigError, nearest

_EXPECTED = {
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "int_type": "a whole number",
    "float_parsing": "a number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "string_type": "a text",
    "tuple_type": "a list",
    "string_too_short": "a text that is not empty",
    "too_short": "at least one value",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "{ge:g} or more",
    "less_than": "less than {lt:g}",
    "less_than_equal": "{le:g} or less",
}


class InvalidOptionsError(ConfigError):
    """Settings that are missing, unknown or wrong; all of them at once.

    Args:
        error: pydantic's findings, kept as ``validation``.
        where: field → ``file:line`` of a value that came from a file.
    """

    def __init__(self, error: ValidationError, options: type[Options], where: Mapping[str, str] | None = None) -> None:
        self.validation = error
        lines: dict[str, str] = {}
        for item in error.errors():
            name = str(item["loc"][0]) if item["loc"] else ""
            lines.setdefault(name, _sentence(name, item, options, (where or {}).get(name, "")))
        text = f"truetune {options.command} --help lists every setting" if options.command else ""
        super().__init__("\n       ".join(lines.values()), ("help", text))


def _sentence(name: str, item: Any, options: type[Options], where: str) -> str:
    flag = f"{where}: --{name.replace('_', '-')}" if where else f"--{name.replace('_', '-')}"
    kind, context, found = item["type"], item.get("ctx", {}), item["input"]
    if kind == "missing":
        return f"{flag} is required: {options.model_fields[name].description}"
    if kind == "value_error" and not name:
        return str(context["error"])
    if kind == "extra_forbidden":
        close = nearest(name, spellings(options))
        return f"unknown setting '{name}'" + (f"; did you mean '{close}'?" if close else "")
    if kind == "literal_error":
        expected = str(context["expected"]).replace("'", "").replace(" or ", ", ")
        close = nearest(str(found), expected.split(", "))
        return f"{flag}: found {found!r}, expected {expected}" + (f"; did you mean '{close}'?" if close else "")
    return f"{flag}: found {_short(found)}, expected {_expectation(item)}"


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else text[:77] + "…"


def _expectation(item: Any) -> str:
    if words := _EXPECTED.get(item["type"]):
        return words.format(**item.get("ctx", {}))
    return str(item["msg"]).removeprefix("Value error, ").removeprefix("Input should be ")
