"""``truetune inspect``: what is this? A model, an adapter, a checkpoint, a run, a GGUF, or a data file."""

from __future__ import annotations

import functools
import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from truetune.adapters import files
from truetune.adapters.vocabulary import NewTokens
from truetune.checkpoint import atomic, run_state
from truetune.checkpoint.tensors import open_index
from truetune.config.inspect import InspectConfig
from truetune.config.methods import METHODS
from truetune.config.resolve import Resolved
from truetune.data.duplicates import likeness, said
from truetune.data.formats import Choice
from truetune.data.formats.columns import parse_columns
from truetune.data.intake import Intake
from truetune.data.language import holds_code, scripts
from truetune.data.read import read_rows
from truetune.data.rejects import counts
from truetune.data.schema import Reject, Row
from truetune.data.sources import suffix_of
from truetune.errors import DataError, nearest
from truetune.models import load
from truetune.models.stored import stored_recipe
from truetune.recipes import inspect_diff
from truetune.recipes.resume import read_settings
from truetune.train.estimate import count_parameters
from truetune.train.log import whole_rows

Parse = Callable[..., tuple[list[Row], list[Reject]]]  # as ``Intake``, with the format settled


def run(resolved: Resolved[InspectConfig]) -> dict[str, Any]:
    """Print what ``path`` is, what two things differ in, or the methods; returns the same facts."""
    if resolved.config.diff:
        return inspect_diff.run(*map(existing, resolved.config.diff))
    if resolved.config.path is None:
        return list_methods()
    path = existing(resolved.config.path)
    intake = Intake(columns=parse_columns(resolved.config.columns))
    facts = describe(path, functools.partial(intake, form=resolved.config.format))
    width = max(map(len, facts))
    for key, value in facts.items():
        print(f"{key:<{width}}  {_text(value)}")  # noqa: T201 - the command's output
    return facts


def existing(name: str) -> Path:
    """The path that a name means. Raises DataError where nothing is there."""
    path = Path(name).expanduser()
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"there is no file or folder {path}", ("did you mean", nearest(path.name, siblings)))
    # What export leaves for llama.cpp or Ollama is the model in it, or the LoRA where that is all.
    inside = [path / name for name in ("model.gguf", "adapter.gguf") if path.is_dir() and (path / name).is_file()]
    return inside[0] if inside else path


def list_methods() -> dict[str, Any]:
    """Print the capability table; returns it by method."""
    marks = ("mergeable", "on_quantised")
    heads = ("method", "leaves", "merges", "packed base", "PEFT's name", "usual lr")
    rows = [
        (name, m.result, *("yes" if getattr(m, mark) else "no" for mark in marks), m.peft or "-", f"{m.lr:g}")
        for name, m in METHODS.items()
    ]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    for row in (heads, *rows):
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())  # noqa: T201
    own = ("result", *marks, "peft", "lr")
    return {name: {key: getattr(method, key) for key in own} for name, method in METHODS.items()}


def describe(path: Path, parse: Parse | None = None) -> dict[str, Any]:
    """The facts about a path, ``kind`` first; ``parse`` understands the rows of data files."""
    parse = parse or functools.partial(Intake(), form="auto")
    if path.is_dir():
        for marker, look in (
            ("run.yaml", _run), ("state.json", _checkpoint), (files.CONFIG, _adapter), ("config.json", _model),
        ):  # fmt: skip
            if (path / marker).is_file():
                return look(path)
        if not find_data(path):
            raise DataError(
                f"{path} is nothing that truetune knows",
                ("it has", ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "no file at all"),
                ("expected", "the folder of a model, an adapter, a checkpoint or a run, or a file or folder of rows"),
            )
    if path.is_file() and path.suffix == ".safetensors":
        return describe(path.parent, parse)
    return inspect_diff.gguf_facts(path) if path.suffix == ".gguf" else _data(path, parse)


def find_data(folder: Path) -> list[Path]:
    """The files of rows right inside a folder."""
    return [path for path in folder.iterdir() if path.is_file() and suffix_of(path.name)]


def _model(path: Path) -> dict[str, Any]:
    config = load.load_config(str(path))
    entries = open_index(path)
    dtypes = Counter(str(entry.dtype).removeprefix("torch.") for entry in entries.values())
    recipe = stored_recipe(config)
    return {
        "kind": "model",
        "architecture": (config.architectures or ["?"])[0],
        "parameters": _parameters(config) if recipe else sum(math.prod(e.shape) for e in entries.values()),
        **({"quantised": str(recipe)} if recipe else {}),
        "size_mb": round(sum(entry.nbytes for entry in entries.values()) / 1e6, 1),
        "dtypes": dict(dtypes),
        "context": load.context_length(config),
        "head": "tied to the embedding table" if getattr(config, "tie_word_embeddings", False) else "its own",
        "chat_template": (path / "chat_template.jinja").is_file() or _has_template(path),
        "weights_sha256": load.weight_hash(path),
    }


def _parameters(config: Any) -> int:
    """Those of the model that a packed checkpoint's codes and scales stand for; a tied head counts once."""
    model = load.skeleton(load.dense_config(config), dtype=load.checkpoint_dtype(config))
    return count_parameters(model)[0]


def _has_template(path: Path) -> bool:
    file = path / "tokenizer_config.json"
    return file.is_file() and bool(json.loads(file.read_text(encoding="utf-8")).get("chat_template"))


def _adapter(path: Path) -> dict[str, Any]:
    file = files.read(path)
    card, config = file.card, file.settings
    return {
        "kind": "adapter",
        "method": config.kind,
        "base": file.config.get("base_model_name_or_path"),
        **config.model_dump(mode="json", exclude={"trainable"}, exclude_defaults=config.kind != "lora"),
        "trainable": [*config.trainable, *(file.config.get("modules_to_save") or ())],
        "new_tokens": new.ids if (new := NewTokens.of_card(card)) else {},
        "tensors": len(file.tensors),
        "parameters": sum(t.numel() for t in file.tensors.values()),
        "size_mb": round(sum(t.numel() * t.element_size() for t in file.tensors.values()) / 1e6, 2),
        "template": (card.get("template") or {}).get("name"),
        **({"on_top_of": f"{file.beneath.settings.kind} of {file.beneath.folder}"} if file.beneath else {}),
        "base_sha256": (card.get("base") or {}).get("weights_sha256"),
        "metrics": card.get("metrics"),
        "made_by": card.get("versions") or {"peft": file.config.get("peft_version")},
    }


def _checkpoint(path: Path) -> dict[str, Any]:
    progress = run_state.read_progress(path)
    return {
        "kind": "checkpoint",
        "step": progress.step,
        "complete": atomic.faults(path) or "yes, every file has its size and hash",
        "tokens": progress.tokens,
        "trained_tokens": progress.trained_tokens,
        "best_step": progress.best_step,
        "best_loss": progress.best_loss,
        "facts": dict(progress.facts),
    }


def _run(path: Path) -> dict[str, Any]:
    flat = read_settings(path)
    newest, damaged = run_state.newest(path)
    losses = [json.loads(row) for row in whole_rows(path / "log.jsonl") if '"loss"' in row]
    result = next((str(path / name) for name in ("adapter", "model") if (path / name).is_dir()), None)
    return {
        "kind": "run",
        "finished": result is not None,
        "model": flat.get("model"),
        "data": flat.get("data"),
        "method": flat.get("method"),
        "steps": losses[-1]["step"] if losses else 0,
        "loss": round(losses[-1]["loss"], 6) if losses else None,
        "newest_checkpoint": str(newest) if newest else None,
        "damaged_checkpoints": [str(p) for p in damaged],
        "result": result,
    }


def _data(path: Path, parse: Parse) -> dict[str, Any]:
    raw, unreadable = read_rows([str(path)])
    settled: dict[str, Choice] = {}
    rows, misfits = parse(raw, choices=settled)
    form = ", ".join(dict.fromkeys(choice.form.NAME for choice in settled.values())) or "none: no row can be read"
    roles = Counter(message.role for row in rows for message in row.messages)
    alike = likeness(rows)
    return {
        "kind": "data",
        "format": form,
        "rows": len(raw) + len(unreadable),
        "usable": len(rows),
        "faulty": counts([*unreadable, *misfits]),
        "first_faults": [f"row {r.origin.row}: {r.detail}" for r in [*unreadable, *misfits][:5]],
        "repeated": len(alike.repeats),
        "nearly_repeated": len(alike.near),
        "first_repeats": [str(pair) for pair in alike.near[:5]],
        "letters": {name: f"{share:.1%}" for name, share in scripts(map(said, rows)).items() if share >= 0.001},
        "rows_with_code": sum(holds_code(said(row)) for row in rows),
        "messages": dict(roles),
        "characters": sum(len(m.content) for row in rows for m in row.messages) + sum(len(row.text) for row in rows),
    }


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items()) or "none"
    if isinstance(value, list):
        return "\n".join(map(str, value)).replace("\n", "; ") or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else "–" if value is None else str(value)
