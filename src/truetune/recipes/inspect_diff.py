"""``truetune inspect --diff A B``: what differs between two runs, checkpoints, adapters, models, GGUFs, data files."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from truetune.adapters import files
from truetune.checkpoint.atomic import sha256
from truetune.checkpoint.header import read_header
from truetune.checkpoint.side_files import side_files
from truetune.checkpoint.tensors import load, open_index
from truetune.data.read import read_rows
from truetune.errors import DataError
from truetune.export.gguf import read_keys
from truetune.export.gguf_read import dense
from truetune.ops.finite import are_finite
from truetune.recipes.resume import read_settings
from truetune.train.log import whole_rows

_SHOWN = 40
_WIDE = 1000  # columns
_SETTINGS = ("config", "generation_config", "tokenizer_config")


def run(one: Path, other: Path) -> dict[str, Any]:
    """Print what differs; exit code 1 where anything does, as of any program that compares.

    Raises:
        DataError: the two are not of one kind.
    """
    kinds = kind_of(one), kind_of(other)
    if kinds[0] != kinds[1]:
        raise DataError(
            "two of a kind can be compared",
            ("found", f"{one}: {kinds[0]}\n{other}: {kinds[1]}"),
            ("way out", "truetune inspect says of each what it is"),
        )
    rows = list(_LOOKS[kinds[0]](one, other))
    _show(kinds[0], one, other, rows)
    differences = [{"what": what, "a": a, "b": b, "how": how} for what, a, b, how in rows]
    return {"kind": kinds[0], "differences": differences, "exit_code": 1 if rows else 0}


Row = tuple[str, Any, Any, str]


def kind_of(path: Path) -> str:
    """``run``, ``checkpoint``, ``adapter``, ``model``, ``gguf`` or ``data``."""
    if path.is_dir():
        markers = (
            ("run.yaml", "run"),
            ("optimizer.safetensors", "checkpoint"),
            (files.CONFIG, "adapter"),
            ("config.json", "model"),
        )
        return next((kind for marker, kind in markers if (path / marker).is_file()), "data")
    return "gguf" if path.suffix == ".gguf" else "data"


def _fields(one: Mapping[str, Any], other: Mapping[str, Any], lead: str = "") -> Iterator[Row]:
    """Keys with different values, nested ones by their path."""
    for key in dict.fromkeys((*one, *other)):
        a, b = one.get(key), other.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from _fields(a, b, f"{lead}{key}.")
        elif a != b:
            yield f"{lead}{key}", a, b, _change(a, b)


def _change(a: Any, b: Any) -> str:
    numbers = [isinstance(v, int | float) and not isinstance(v, bool) for v in (a, b)]
    return f"{b - a:+.6g}" if all(numbers) else ""


def _runs(one: Path, other: Path) -> Iterator[Row]:
    """Settings, then what the log ends with, then the result."""
    for row in _fields(read_settings(one), read_settings(other)):
        if row[0] not in ("out", "resume"):
            yield row
    yield from _fields(_end(one), _end(other), "result: ")
    reports = [_json(run / "data" / "report.json") for run in (one, other)]
    yield from _fields(reports[0], reports[1], "data: ")
    results = [next((run / n for n in ("adapter", "model") if (run / n).is_dir()), None) for run in (one, other)]
    if results[0] and results[1] and results[0].name == results[1].name:
        look = _adapter_tensors if results[0].name == "adapter" else _models
        yield from look(results[0], results[1])


def _checkpoints(one: Path, other: Path) -> Iterator[Row]:
    """Where training stood, then what was trained, and the optimizer's state."""
    yield from _fields(_json(one / "state.json"), _json(other / "state.json"), "state: ")
    a, b = (_plain(_json(folder / "adapter" / files.CONFIG)) for folder in (one, other))
    yield from _fields(a, b, "config: ")
    weights = sorted({path.relative_to(top).as_posix() for top in (one, other) for path in top.rglob("*.safetensors")})
    for name in weights:
        held, others = (read_header(top / name) if (top / name).is_file() else {} for top in (one, other))
        get, get_other = (lambda key, entries=entries: load(entries[key]) for entries in (held, others))
        for what, first, second, how in _tensors(held.keys(), others.keys(), get, get_other):
            yield f"{Path(name).stem}: {what}", first, second, how


def _end(run: Path) -> dict[str, Any]:
    """The last row of each kind in the log, without what a clock or a machine says."""
    found: dict[str, Any] = {}
    for line in whole_rows(run / "log.jsonl"):
        found |= json.loads(line)
    return {key: value for key, value in found.items() if key not in ("tok_s", "peak_mb")}


def _json(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def _adapters(one: Path, other: Path) -> Iterator[Row]:
    a, b = files.read(one), files.read(other)
    yield from _fields(_plain(a.config), _plain(b.config), "config: ")
    yield from _fields(a.card.get("metrics") or {}, b.card.get("metrics") or {}, "metrics: ")
    told = [{k: (file.card.get(k) or {}).get("sha256") for k in ("template",)} for file in (a, b)]
    yield from _fields(told[0], told[1], "sha256 of ")
    yield from _adapter_tensors(one, other)


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """PEFT writes names in any order."""
    return {key: sorted(value) if isinstance(value, list) else value for key, value in config.items()}


def _adapter_tensors(one: Path, other: Path) -> Iterator[Row]:
    a, b = files.read(one).tensors, files.read(other).tensors
    yield from _tensors(a.keys(), b.keys(), a.__getitem__, b.__getitem__)


def _models(one: Path, other: Path) -> Iterator[Row]:
    """What is beside the weights, then one tensor of each in memory at a time; equal ones are not told."""
    for name in _SETTINGS:
        yield from _fields(_json(one / f"{name}.json"), _json(other / f"{name}.json"), f"{name}: ")
    yield from _beside(one, other)
    a, b = open_index(one), open_index(other)
    yield from _tensors(a.keys(), b.keys(), lambda name: load(a[name]), lambda name: load(b[name]))


def _beside(one: Path, other: Path) -> Iterator[Row]:
    """Files that have a say in what the model makes of a text: its tokenizer, its template, its code."""
    found, others = (
        {path.relative_to(folder).as_posix(): sha256(path)[:12] for path in side_files(folder) if _counts(path)}
        for folder in (one, other)
    )
    for name, a, b, _ in _fields(found, others):
        # Another order or spacing of a JSON file is the same.
        if not (name.endswith(".json") and a and b and _json(one / name) == _json(other / name) != {}):
            yield name, a, b, "another content" if a and b else "only in one"


def _counts(path: Path) -> bool:
    words = path.name.upper().startswith(("LICEN", "NOTICE", "USE_POLICY"))
    return not words and path.stem not in _SETTINGS


def _ggufs(one: Path, other: Path) -> Iterator[Row]:
    (keys, tensors), (other_keys, other_tensors) = read_keys(one), read_keys(other)
    yield from _fields(keys, other_keys, "key: ")
    a, b = ({tensor.name: tensor for tensor in found} for found in (tensors, other_tensors))
    yield from _tensors(a.keys(), b.keys(), lambda name: dense(a[name]), lambda name: dense(b[name]))


def gguf_facts(path: Path) -> dict[str, Any]:
    """What a GGUF is, as ``inspect`` tells it."""
    keys, tensors = read_keys(path)
    arch, tokens = keys.get("general.architecture", "?"), keys.get("tokenizer.ggml.tokens", ())
    ends = (keys.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot"))
    return {
        "kind": "gguf",
        "holds": keys.get("general.type", "model"),
        "architecture": arch,
        "name": keys.get("general.name"),
        "parameters": sum(int(tensor.n_elements) for tensor in tensors),
        "size_mb": round(sum(int(tensor.n_bytes) for tensor in tensors) / 1e6, 1),
        "types": dict(Counter(tensor.tensor_type.name.lower() for tensor in tensors)),
        **{key.removeprefix(f"{arch}."): value for key, value in keys.items() if key.startswith(f"{arch}.")},
        "adapter_alpha": keys.get("adapter.lora.alpha"),
        "tokenizer": keys.get("tokenizer.ggml.model"),
        "tokens": len(tokens),
        "ends_with": [tokens[number] for number in ends if number is not None],
        "chat_template": "tokenizer.chat_template" in keys,
    }


def _tensors(
    names: Any, other_names: Any, get: Callable[[str], Tensor], get_other: Callable[[str], Tensor]
) -> Iterator[Row]:
    for name in sorted({*names, *other_names}):
        if name not in names or name not in other_names:
            yield name, "there" if name in names else None, "there" if name in other_names else None, "only in one"
            continue
        a, b = get(name), get_other(name)
        forms = [f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in (a, b)]
        if a.shape != b.shape:
            yield name, forms[0], forms[1], "another shape"
        elif not torch.equal(a, b) or a.dtype != b.dtype:
            wide = {"A": a.double(), "B": b.double()}
            gap = (wide["A"] - wide["B"]).abs().max().item() if a.numel() else 0.0
            spoilt = [side for side, values in wide.items() if not are_finite(values)]
            how = f"NaN or infinity in {' and '.join(spoilt)}" if spoilt else f"max |Δ| {gap:.3g}"
            yield name, forms[0], forms[1], how


def _rows(one: Path, other: Path) -> Iterator[Row]:
    """Rows by their content, wherever they stand."""
    counts = []
    for path in (one, other):
        raw, unreadable = read_rows([str(path)])
        counts.append((Counter(_text(row.value) for row in raw), len(unreadable)))
    (a, bad_a), (b, bad_b) = counts
    yield from _fields({"rows": a.total(), "unreadable": bad_a}, {"rows": b.total(), "unreadable": bad_b})
    for left, which in ((a - b, 0), (b - a, 1)):
        if left:
            first = next(iter(left))
            told = [left.total() if which == side else 0 for side in (0, 1)]
            shown = first if len(first) <= 90 else f"{first[:89]}…"
            yield f"rows only in {'B' if which else 'A'}", told[0], told[1], shown


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str, ensure_ascii=False)


_LOOKS: Mapping[str, Callable[[Path, Path], Iterator[Row]]] = {
    "run": _runs, "checkpoint": _checkpoints, "adapter": _adapters, "model": _models, "gguf": _ggufs, "data": _rows,
}  # fmt: skip


def _show(kind: str, one: Path, other: Path, rows: list[Row]) -> None:
    # In a pipe a name stays in one piece, for whoever looks for it there.
    console = Console(highlight=False, soft_wrap=False, width=None if sys.stdout.isatty() else _WIDE)
    console.print(f"A {one}\nB {other}", markup=False, soft_wrap=True)
    if not rows:
        console.print(f"no difference: the two are the same {kind}")
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in (kind, "A", "B", ""):
        table.add_column(heading, overflow="fold")
    for what, a, b, how in rows[:_SHOWN]:
        table.add_row(*(_cell(value).replace("[", r"\[") for value in (what, a, b, how)))
    console.print(table)
    if len(rows) > _SHOWN:
        console.print(f"… and {len(rows) - _SHOWN} more; --json tells all of them")


def _cell(value: Any) -> str:
    text = "–" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 100 else f"{text[:99]}…"
