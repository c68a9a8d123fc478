"""That the native tier is there wherever it can be: without this, a slip in it would only skip its tests."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from truetune.ops.native.build import INSTRUCTION_SETS, InstructionSet
from truetune.ops.native.library import reason

NAMES = [os.environ.get("CC", ""), "cc", "gcc", "clang"]


@pytest.mark.parametrize("entry", INSTRUCTION_SETS, ids=lambda entry: entry.name)
def test_our_sources_build_and_load(entry: InstructionSet, tmp_path: Path) -> None:
    compiler = next(filter(None, map(shutil.which, filter(None, NAMES))), None)
    if compiler is None:
        pytest.skip("no C compiler")
    if not entry.present():
        pytest.skip("this CPU lacks the set")
    (tmp_path / "empty.c").write_text("int nothing;\n", encoding="utf-8")
    command = [compiler, *entry.flags, "-c", "empty.c", "-o", "empty.o"]
    if subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode:
        pytest.skip("this compiler does not know the set")
    assert reason(entry.name) == ""
