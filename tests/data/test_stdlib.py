import ast
import hashlib
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from truetune.data import stdlib
from truetune.data.stdlib import FunctionRow, function_rows, parses
from truetune.errors import DataError

WHOLE = 10**9


@pytest.fixture(scope="module", params=[False, True], ids=["training", "held out"])
def rows(request: pytest.FixtureRequest) -> list[FunctionRow]:
    return function_rows(held_out=request.param, max_chars=WHOLE)


def rows_of(source: str) -> list[tuple[str, str]]:
    pairs = (stdlib._cut(node, source.split("\n")) for _, node in stdlib._functions(ast.parse(source)))
    return [pair for pair in pairs if pair is not None]


def test_every_held_out_name_is_a_module_here() -> None:
    assert [name for name in stdlib.HELD_OUT if find_spec(name) is None] == []


def test_held_out_part_is_a_tenth_of_the_library() -> None:
    sizes = {
        held_out: sum(len(source) for _, source, _ in stdlib._parsed(held_out=held_out, tests=False))
        for held_out in (False, True)
    }
    assert 0.08 < sizes[True] / sum(sizes.values()) < 0.13


def test_modules_are_sorted_and_in_one_part_only() -> None:
    names = {
        held_out: [path for path, _ in stdlib._files() if stdlib._is_held_out(path) == held_out]
        for held_out in (False, True)
    }
    assert names[True] == sorted(names[True])
    assert set(names[True]).isdisjoint(names[False])
    assert {name.split(".")[0] for name in names[True]} == set(stdlib.HELD_OUT)


def test_held_out_modules_come_without_tests() -> None:
    sources = dict(stdlib.modules(held_out=True))
    assert "json.decoder" in sources
    assert not any(map(stdlib.is_test, sources))


@pytest.mark.parametrize(
    "name", ["test.test_json.test_dump", "test.test_httplib", "test.test_email", "test.test_heapq"]
)
def test_tests_of_held_out_modules_are_trained_on_by_nobody(name: str) -> None:
    assert stdlib._tests_held_out(name)


def test_other_tests_are_not_held_out() -> None:
    assert not stdlib._tests_held_out("test.test_inspect.test_inspect")


def test_tables_and_other_peoples_code_are_left_out() -> None:
    names = {name for name, _ in stdlib._files()}
    assert not any(name.startswith(("encodings", "pydoc_data", "_sysconfigdata", "site-packages")) for name in names)
    assert {"tokenize", "html.parser", "html"} <= names  # a table's name is no prefix of its neighbours'


def test_there_are_rows_to_learn_and_to_test_on(rows: list[FunctionRow]) -> None:
    assert len(rows) > 300


def test_every_row_parses(rows: list[FunctionRow]) -> None:
    assert [(row.module, row.name) for row in rows if not parses(row.prompt, row.answer)] == []


def test_prompt_is_a_signature_and_a_docstring(rows: list[FunctionRow]) -> None:
    for row in rows:
        tree = stdlib._parse(row.prompt)  # quiet about invalid escapes in the library
        assert tree is not None
        [function] = tree.body
        assert isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        assert len(function.body) == 1
        assert ast.get_docstring(function) is not None
        assert row.prompt.endswith(('"', "'"))
        assert row.name.endswith(function.name)


def test_answer_is_indented_and_has_no_blank_ends(rows: list[FunctionRow]) -> None:
    for row in rows:
        assert row.answer.startswith("    ")
        assert row.answer == row.answer.strip("\n")


def test_no_row_comes_twice(rows: list[FunctionRow]) -> None:
    assert len({(row.prompt, row.answer) for row in rows}) == len(rows)


def test_no_row_is_from_a_test(rows: list[FunctionRow]) -> None:
    assert not any(stdlib.is_test(row.module) for row in rows)


def test_no_held_out_answer_is_a_training_answer() -> None:
    trained = {row.answer for row in function_rows(held_out=False, max_chars=WHOLE)}
    assert [row for row in function_rows(held_out=True, max_chars=WHOLE) if row.answer in trained] == []


def test_limit_leaves_long_rows_out_and_cuts_none() -> None:
    whole = function_rows(held_out=True, max_chars=WHOLE)
    assert function_rows(held_out=True, max_chars=500) == [r for r in whole if len(r.prompt) + len(r.answer) <= 500]


def test_another_process_finds_the_same_rows() -> None:
    code = (
        "import hashlib; from truetune.data.stdlib import function_rows as f;"
        "print(hashlib.sha256(repr(f(held_out=True)).encode()).hexdigest())"
    )
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "1"}
    there = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    here = hashlib.sha256(repr(function_rows(held_out=True)).encode()).hexdigest()
    assert there.stdout.strip() == here


def test_method_moves_to_column_zero_without_its_decorator() -> None:
    source = (
        "class A:\n    @property\n    def f(self) -> int:\n        '''Doc.\n\n        More.\n        '''\n\n"
        "        # why\n        if self:\n            return 1\n\n        return 2\n\n    x = 1\n"
    )
    [(prompt, answer)] = rows_of(source)
    assert prompt == "def f(self) -> int:\n    '''Doc.\n\n    More.\n    '''"
    assert answer == "    # why\n    if self:\n        return 1\n\n    return 2"


@pytest.mark.parametrize(
    "body",
    ["pass", "...", "raise NotImplementedError", "raise NotImplementedError('no')", "'another string'"],
)
def test_stub_is_no_row(body: str) -> None:
    assert rows_of(f"def f():\n    'Doc.'\n    {body}\n") == []


def test_function_without_docstring_is_no_row() -> None:
    assert rows_of("def f():\n    return 1\n") == []


def test_function_that_would_change_by_moving_is_no_row() -> None:
    long_string = "class A:\n    def f(self):\n        'Doc.'\n        return '''a\n        b'''\n"
    assert rows_of(long_string) == []
    assert len(rows_of(long_string.replace("\n        b", ""))) == 1


def test_parses_tells_python_from_noise() -> None:
    assert parses("def f():\n    'Doc.'", "    return 1")
    assert not parses("def f():\n    'Doc.'", "    return (")
    assert not parses("def f():\n    'Doc.'", "\0")


def test_python_without_source_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda _: "/nowhere")
    with pytest.raises(DataError, match="no source of the standard library"):
        stdlib._files()
