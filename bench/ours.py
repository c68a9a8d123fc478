"""truetune's side of the bench: the command a user would type, and the rows it trains on, for the others.

``python -m bench.ours TASK.json`` writes the rows in the very order of our plan:

- ``rows.jsonl``: ``input_ids``, and ``labels`` with -100 where nothing is learned;
- ``alpaca/train.json`` (and an empty ``val.json``): the same rows as the data file has them;
- ``messages.jsonl``: the whole prompt as the user's message, for tools whose own prompt would be another.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.measure import Setting, Step, read_lines

IGNORED = -100


def command(setting: Setting, *, model: Path, data: Path, out: Path, steps: int, recompute: str | None) -> list[str]:
    """``truetune sft …`` in this interpreter."""
    flags = {
        "model": model, "data": data, "template": "alpaca", "dtype": setting.dtype, "method": "lora",
        "rank": setting.rank, "alpha": 2 * setting.rank, "dropout": setting.dropout, "targets": "all-linear",
        "batch-size": setting.batch_size, "max-length": setting.max_length, "on-overlong": "drop",
        "lr": setting.lr, "warmup": 0, "max-steps": steps, "save-every": 0, "out": out,
    }  # fmt: skip
    if recompute is not None:
        flags["recompute"] = recompute
    named = [part for flag, value in flags.items() for part in (f"--{flag}", str(value))]
    return [sys.executable, "-m", "truetune", "sft", *named, "--json"]


def steps(log: Path, tokens: Sequence[int]) -> list[Step]:
    """The steps of ``log.jsonl``, whose ``tok_s`` is of one step alone where every step is logged.

    Raises:
        ValueError: we trained on other rows than the peers were given.
    """
    rows = [row for row in read_lines(log) if "loss" in row]
    if [row["tokens"] for row in rows] != list(tokens):
        raise ValueError("the tokens in log.jsonl are not those of the rows that the peers train on")
    return [Step(row["tokens"] / row["tok_s"], row["loss"]) for row in rows]


def token_counts(rows: Path, batch_size: int) -> tuple[list[int], list[int]]:
    """(tokens, trained tokens) of each step in ``rows.jsonl``; a row's first token is predicted from nothing."""
    pairs = [(len(row["input_ids"]), sum(i != IGNORED for i in row["labels"][1:])) for row in read_lines(rows)]
    batches = [pairs[i : i + batch_size] for i in range(0, len(pairs), batch_size)]
    return [sum(n for n, _ in batch) for batch in batches], [sum(n for _, n in batch) for batch in batches]


def write_rows(setting: Setting, *, model: Path, data: Path, folder: Path) -> None:
    """See above; the order is asked of the product itself."""
    from truetune.config.sft import SFTConfig
    from truetune.data.plan import StepPlan
    from truetune.data.read import read_rows
    from truetune.models.tokenizer import ChatTokenizer
    from truetune.recipes.data import prepare_sft
    from truetune.train.log import Screen

    config = SFTConfig(
        model=str(model), data=(str(data),), template="alpaca", batch_size=setting.batch_size,
        max_length=setting.max_length, on_overlong="drop",
    )  # fmt: skip
    tokenizer = ChatTokenizer.load(config.model)
    examples = prepare_sft(config, tokenizer, max_length=setting.max_length, screen=Screen()).train
    plan = StepPlan.build(
        examples, batch_size=config.batch_size, micro_tokens=2048, packing=True, seed=config.seed,
        epochs=config.epochs, max_steps=setting.steps,
    )  # fmt: skip
    values: dict[Any, Any] = {row.origin: row.value for row in read_rows(config.data)[0]}
    rows, alpaca, messages = [], [], []
    for index in (i for step in range(plan.steps) for i in plan.examples(step)):
        tokens, trained = examples.example(index)
        ids, flags, value = tokens.tolist(), trained.tolist(), values[examples.origins[index]]
        labels = [i if flag else IGNORED for i, flag in zip(ids, flags, strict=True)]
        rows.append({"input_ids": ids, "labels": labels})
        alpaca.append(value)
        prompt = tokenizer.decode(ids[: flags.index(True)])
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": value["output"]}]
        messages.append({"messages": turns})
    (folder / "alpaca").mkdir(parents=True, exist_ok=True)
    _write_lines(folder / "rows.jsonl", rows)
    _write_lines(folder / "messages.jsonl", messages)
    (folder / "alpaca" / "train.json").write_text(json.dumps(alpaca), encoding="utf-8")
    (folder / "alpaca" / "val.json").write_text("[]", encoding="utf-8")


def write_corpus(path: Path) -> None:
    """The demo's rows as alpaca ones: functions of the standard library, body from signature and docstring."""
    from truetune.data.stdlib import function_rows

    rows = [{"instruction": r.prompt, "input": "", "output": r.answer} for r in function_rows(held_out=False)]
    path.write_text(json.dumps(rows), encoding="utf-8")


def _write_lines(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1] == "corpus":
        write_corpus(Path(sys.argv[2]))
    else:
        task = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
        write_rows(Setting(**task.pop("setting")), **{name: Path(path) for name, path in task.items()})
