"""The standard library of the running interpreter as a corpus: offline on every machine, permissively licensed.

``truetune pretrain`` made the embedded base from ``modules(held_out=False)``; ``truetune demo`` tunes it on
``function_rows(held_out=False)`` and measures it on ``function_rows(held_out=True)``, of which it has seen neither
the modules, nor their tests.  Functions whose body is also a training answer are taken out of the held-out rows.
"""

from __future__ import annotations

import ast
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeAlias

from truetune.errors import DataError

HELD_OUT: tuple[str, ...] = (
    "calendar",
    "colorsys",
    "configparser",
    "email",
    "fractions",
    "graphlib",
    "heapq",
    "http",
    "json",
    "logging",
    "sched",
    "shelve",
    "statistics",
    "textwrap",
)
"""Top-level names never trained on: documented pure Python, in every version from 3.10 to 3.14, about a tenth."""

_NOT_THE_LIBRARY = frozenset({"site-packages", "dist-packages", "_bundled", "__pycache__", "lib-dynload", "data"})
"""Folders of other people's code, and of ``data`` that tests feed to parsers (some of it broken on purpose)."""

_TABLES = ("_sysconfigdata", "_sysconfig_vars", "_opcode_metadata", "encodings", "html.entities", "idlelib.help",
           "keyword", "opcode", "pydoc_data", "stringprep", "this", "token", "tkinter.constants")  # fmt: skip
"""Written by a script, or nothing but rows of constants: megabytes of numbers that teach no Python."""

_Function: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef

_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})


@dataclass(frozen=True)
class FunctionRow:
    """One function of the library: ``prompt`` is its signature and docstring, ``answer`` the body that follows."""

    module: str
    name: str
    prompt: str
    answer: str


def parses(prompt: str, answer: str) -> bool:
    """Whether the two, one line after the other, are Python that this interpreter can parse."""
    return _parse(f"{prompt}\n{answer}") is not None


def is_test(module: str) -> bool:
    """Whether a dotted name lies in a package of tests."""
    return not _TEST_FOLDERS.isdisjoint(module.split("."))


def modules(*, held_out: bool) -> Iterator[tuple[str, str]]:
    """Every usable module as ``(dotted name, source)``, sorted by name.

    Args:
        held_out: the held-out modules (without tests), or all the others (with their tests).
    """
    return ((name, source) for name, source, _ in _parsed(held_out=held_out, tests=True))


def function_rows(*, held_out: bool, max_chars: int = 1200) -> list[FunctionRow]:
    """Every documented function with a body of its own, in the order of the modules.

    Args:
        held_out: from the held-out modules, or from all the others. Tests are in neither.
        max_chars: the longest prompt and answer together; longer ones are left out, never cut.
    """
    return [row for row in _rows(held_out) if len(row.prompt) + len(row.answer) <= max_chars]


@cache
def _rows(held_out: bool) -> tuple[FunctionRow, ...]:
    # Some of the library is copied from module to module (imghdr into email): a body seen in training is no test.
    known = {row.answer for row in _rows(False)} if held_out else set()
    seen: set[tuple[str, str]] = set()
    rows = []
    for module, source, tree in _parsed(held_out=held_out, tests=False):
        lines = source.split("\n")  # not splitlines(): a form feed ends no line for ``ast``
        for name, node in _functions(tree):
            pair = _cut(node, lines)
            if pair is not None and pair not in seen and pair[1] not in known:
                seen.add(pair)
                rows.append(FunctionRow(module, name, *pair))
    return tuple(rows)


def _parsed(*, held_out: bool, tests: bool) -> Iterator[tuple[str, str, ast.Module]]:
    for name, path in _files():
        if _is_held_out(name) != held_out or (is_test(name) and (_tests_held_out(name) or not tests)):
            continue
        try:
            source = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # another encoding: only tests of the tokenizer
        tree = _parse(source)
        if tree is not None:
            yield name, source, tree


def _files() -> list[tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        table = any(name == table or name.startswith((f"{table}.", f"{table}_")) for table in _TABLES)
        if not table and _NOT_THE_LIBRARY.isdisjoint(parts):
            found.append((name, path))
    if not found:
        raise DataError(
            f"{root}: no source of the standard library",
            ("or", "use a Python that comes with it as .py files; zipped and embedded builds do not"),
        )
    return sorted(found)


def _is_held_out(module: str) -> bool:
    return module.split(".")[0] in HELD_OUT


def _tests_held_out(module: str) -> bool:
    """By prefix: ``http`` is tested in test_httplib, test_http_cookies and more."""
    return any(part.startswith(tuple(f"test_{name}" for name in HELD_OUT)) for part in module.split("."))


def _parse(source: str) -> ast.Module | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes and the like: not the user's code
        try:
            return ast.parse(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None


def _functions(parent: ast.AST, scope: str = "") -> Iterator[tuple[str, _Function]]:
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, ast.expr):
            continue  # no statement below an expression, and long ones nest deep
        name = scope
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            name = f"{scope}.{node.name}".lstrip(".")
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield name, node
        yield from _functions(node, name)


def _cut(node: _Function, lines: list[str]) -> tuple[str, str] | None:
    """The function at column 0, cut behind its docstring; None where it can't be cut without changing what it says."""
    doc, body = node.body[0], node.body[1:]
    margin = node.col_offset
    documented = isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant) and isinstance(doc.value.value, str)
    if not documented or all(map(_is_stub, body)) or doc.col_offset != margin + 4:
        return None
    start, end = doc.end_lineno or 0, node.end_lineno or 0
    if body[0].lineno == start or doc.lineno == node.lineno or lines[node.lineno - 1][:margin].strip(" "):
        return None
    head = [*lines[node.lineno - 1 : start - 1], lines[start - 1].encode()[: doc.end_col_offset].decode()]
    prompt, answer = (
        "\n".join(line[:margin].lstrip(" ") + line[margin:] for line in part).strip("\n")
        for part in (head, lines[start:end])
    )
    # Moving to column 0 also moves the lines of a long string in the body: such a function would be another one.
    moved = _parse(f"{prompt}\n{answer}")
    same = moved is not None and [ast.dump(n) for n in moved.body[0].body[1:]] == [ast.dump(n) for n in body]  # type: ignore[attr-defined]
    return (prompt, answer) if same and answer.startswith("    ") else None


def _is_stub(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Raise) and statement.exc is not None:
        return "NotImplementedError" in ast.unparse(statement.exc)
    return isinstance(statement, ast.Pass) or (
        isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    )
