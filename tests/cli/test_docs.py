"""What the pages tell people to type is what the program understands."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from truetune.cli.flags import build_parser
from truetune.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# A command as it stands in code, up to the end of that code, of its line, or of what the shell hands it.
COMMAND = re.compile(r"(?<![\w.-])(?<!import )(?<!from )truetune ((?:[a-z]+-)?[a-z]+)\b([^`|>\n]*)")
MEANT = {"truetune sft --lern-rate"}  # how long a mistake takes to be told
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")


def joined(text: str) -> str:
    """With commands that a backslash, or a line's end within backticks, cuts in two made whole."""
    text = text.replace("\\\n", " ")
    return re.sub(r"(?<!`)`[^`]+`(?!`)", lambda code: code[0].replace("\n", " "), text)


def in_code(text: str) -> str:
    """The code of a page: blocks, and what stands in backticks."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    inline = re.findall(
        r"(?<!`)`([^`]+)`(?!`)", joined(re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    )
    return "\n".join([*(block.replace("\\\n", " ") for block in blocks), *inline])


def flags_of(command: str) -> set[str]:
    module, _, name = COMMANDS[command].config.partition(":")
    parser = build_parser(command, getattr(importlib.import_module(module), name))
    return {"--help"} | {flag for action in parser._actions for flag in action.option_strings}


def faults(text: str) -> list[str]:
    found = []
    for command, rest in COMMAND.findall(in_code(text)):
        if command not in COMMANDS:
            found.append(f"truetune {command}")
        else:
            found += [f"truetune {command} {flag}" for flag in FLAG.findall(rest) if flag not in flags_of(command)]
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_on_a_page_is_understood(page: Path) -> None:
    assert [fault for fault in faults(page.read_text(encoding="utf-8")) if fault not in MEANT] == []


def test_the_readme_names_every_command() -> None:
    named = {command for command, _ in COMMAND.findall(in_code((ROOT / "README.md").read_text(encoding="utf-8")))}
    assert set(COMMANDS) <= named


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("`truetune sfft --model M`", "truetune sfft"),
        ("`.venv/bin/truetune sft --model M\n--rnak 3`", "truetune sft --rnak"),
        ("```\ntruetune merge --model M \\\n  --outt D\n```", "truetune merge --outt"),
    ],
)
def test_a_planted_fault_is_found(text: str, fault: str) -> None:
    assert faults(text) == [fault]
