"""The house stands: imports go down only, the light rooms stay light, and no room becomes an attic."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "src" / "truetune"
FILES = sorted(ROOT.rglob("*.py"))

LEVELS = [
    {"errors", "config"},
    {"ops"},
    {"quant", "adapters", "optim", "data", "dist"},
    {"checkpoint"},
    {"models"},
    {"train", "eval", "export", "generate"},
    {"recipes"},
    {"serve"},
    {"web"},
    {"api", "nn"},
    {"__init__"},
    {"cli"},
    {"__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
# Rooms that know nothing of each other; the others of one level may, as errors and config do.
APART = [
    {"quant", "adapters", "optim", "data", "dist"},
    {"train", "eval", "export", "generate"},
]
ATTICS = {"utils", "util", "common", "helpers", "helper", "misc"}
PEERS = {"peft", "bitsandbytes", "loralib", "accelerate", "trl", "litgpt", "swift"}
ONLY_IN = {"transformers": {"models"}, "safetensors": {"models", "adapters", "checkpoint", "data"}}


def room_of(module: str) -> str:
    """``adapters`` of ``truetune.adapters.lora``; the package itself is ``__init__``."""
    return [*module.split("."), "__init__"][1]


def module_of(path: Path, root: Path) -> str:
    parts = ["truetune", *path.relative_to(root).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


def imports(path: Path, module: str) -> Iterator[tuple[int, str]]:
    """``(line, module)`` of every import in a file: in functions and under TYPE_CHECKING too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name != "truetune" or not only_reads_version(tree, alias.asname or "truetune"):
                    yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [base])])
            for alias in node.names:
                if base != "truetune":
                    yield node.lineno, base
                elif alias.name != "__version__":
                    yield node.lineno, f"truetune.{alias.name}" if alias.name in LEVEL else "truetune"


def only_reads_version(tree: ast.AST, name: str) -> bool:
    """Whether a file that imports the package itself asks it for nothing but its version."""
    uses = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)]
    return all(use.attr == "__version__" for use in uses if use.value.id == name)  # type: ignore[attr-defined]


def faults(root: Path) -> list[str]:
    """Every edge that breaks a rule, as ``file:line: what``."""
    found = []
    for path in sorted(root.rglob("*.py")):
        module = module_of(path, root)
        here = room_of(module)
        for line, target in imports(path, module):
            where, top = f"{path.relative_to(root)}:{line}", target.split(".")[0]
            if top in PEERS:
                found.append(f"{where}: imports {top}")
            if top in ONLY_IN and here not in ONLY_IN[top]:
                found.append(f"{where}: {here} imports {top}, which is for {', '.join(sorted(ONLY_IN[top]))}")
            if top == "truetune" and (there := room_of(target)) != here:
                apart = any({here, there} <= rooms for rooms in APART)
                if apart or LEVEL[there] > LEVEL[here]:
                    found.append(f"{where}: {here} imports {there}, {'a sibling' if apart else 'which is above it'}")
    return found


def test_every_room_has_a_level() -> None:
    rooms = {path.name.removesuffix(".py") for path in ROOT.iterdir() if path.suffix == ".py" or any(path.glob("*.py"))}
    assert rooms <= set(LEVEL)


def test_imports_go_down_only() -> None:
    assert faults(ROOT) == []


@pytest.mark.parametrize(
    ("file", "line", "fault"),
    [
        ("ops/x.py", "from truetune.adapters import lora", "ops imports adapters, which is above it"),
        ("ops/x.py", "def f():\n    import truetune.recipes.sft", "ops imports recipes, which is above it"),
        ("data/x.py", "if TYPE_CHECKING:\n    from truetune.optim import adamw", "data imports optim, a sibling"),
        ("train/x.py", "from truetune.eval.perplexity import evaluate", "train imports eval, a sibling"),
        ("train/x.py", "from ..export import merge", "train imports export, a sibling"),
        ("models/x.py", "import truetune\ntruetune.load", "models imports __init__, which is above it"),
        ("config/x.py", "from truetune import nn", "config imports nn, which is above it"),
        ("recipes/x.py", "import transformers", "recipes imports transformers, which is for models"),
        ("ops/x.py", "from safetensors.torch import load_file", "ops imports safetensors, which is for"),
        ("models/x.py", "def f():\n    from peft import PeftModel", "imports peft"),
    ],
)
def test_a_planted_fault_is_found(tmp_path: Path, file: str, line: str, fault: str) -> None:
    path = tmp_path / file
    path.parent.mkdir()
    path.write_text(line, encoding="utf-8")
    (found,) = faults(tmp_path)
    assert fault in found


@pytest.mark.parametrize(
    "line",
    ["import truetune\ntruetune.__version__", "from truetune import __version__", "from truetune.ops import rng"],
)
def test_what_is_allowed_is_not_reported(tmp_path: Path, line: str) -> None:
    path = tmp_path / "recipes" / "x.py"
    path.parent.mkdir()
    path.write_text(line, encoding="utf-8")
    assert faults(tmp_path) == []


def test_no_room_is_an_attic() -> None:
    assert [str(path) for path in ROOT.rglob("*") if path.stem in ATTICS] == []


def test_no_file_is_longer_than_500_lines() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {name: length for name, length in lengths.items() if length >= 500} == {}


def test_the_light_rooms_import_no_heavy_library() -> None:
    light = [
        module_of(p, ROOT) for p in FILES if room_of(module_of(p, ROOT)) in ("config", "cli", "errors", "__init__")
    ]
    code = (
        f"import sys, importlib\nfor name in {light}: importlib.import_module(name.removesuffix('.__init__'))\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'safetensors', 'rich', 'matplotlib'} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
