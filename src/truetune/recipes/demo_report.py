"""The demo's last page: the table, one question side by side, and where the model is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.syntax import Syntax
from rich.table import Table

from truetune.recipes.quality import Contestant


def facts(
    before: Contestant, after: Contestant, merged: Contestant, questions: Sequence[str], *,
    parses: Callable[[str, str], bool],
) -> dict[str, Any]:  # fmt: skip
    """The figures, as ``--json`` prints them."""

    def good(answers: Sequence[str]) -> float:
        return sum(parses(q, a) for q, a in zip(questions, answers, strict=True)) / max(1, len(questions))

    return {
        "perplexity": [round(c.quality.evaluation.perplexity, 3) for c in (before, after, merged)],
        "accuracy": [round(c.quality.evaluation.accuracy, 4) for c in (before, after, merged)],
        "parses": [round(good(c.answers), 4) for c in (before, after, merged)],
        "held_out_tokens": after.quality.evaluation.tokens,
        "merged_same_answers": sum(a == b for a, b in zip(after.answers, merged.answers, strict=True)),
        "questions": len(questions),
        "dtype": str(after.speaker.model.dtype).removeprefix("torch."),
    }


def show(
    facts: dict[str, Any],
    before: Contestant,
    after: Contestant,
    questions: Sequence[str],
    *,
    proof: Callable[[], None],
) -> None:
    """Print the page to stdout; ``proof`` prints its own part of it."""
    console = Console(highlight=False)
    table = Table(box=box.SIMPLE_HEAD, title="held-out functions, never seen in pre-training or tuning")
    for heading, align in (("", "left"), ("base", "right"), ("with adapter", "right"), ("merged", "right")):
        table.add_column(heading, justify=align)  # type: ignore[arg-type]
    table.add_row("perplexity of the true body", *(f"{v:,.2f}" for v in facts["perplexity"]))
    table.add_row("next token right", *(f"{v:.1%}" for v in facts["accuracy"]))
    table.add_row("answers that are valid Python", *(f"{v:.0%}" for v in facts["parses"]))
    console.print(table)
    index = _example(after, questions)
    console.print("one question, two answers", style="bold")
    console.print(_code(questions[index], "the question"))
    halves = [_code(c.answers[index], name) for c, name in ((before, "base"), (after, "with adapter"))]
    if console.width >= 100:
        pair = Table.grid(expand=True)
        pair.add_column(ratio=1)
        pair.add_column(ratio=1)
        pair.add_row(*halves)
        console.print(pair)
    else:
        console.print(*halves)
    proof()
    console.print(
        f"cost     {facts['seconds']:.0f} s in all, {facts['train_seconds']:.0f} s of it tuning at "
        f"{facts['tok_s']:,.0f} tokens/s · peak {facts['peak_mb'] / 1e3:.1f} GB"
    )
    console.print(f"model    {facts['merged']}")
    console.print(f"next     {ask(facts['merged'])}", soft_wrap=True)


def _example(after: Contestant, questions: Sequence[str]) -> int:
    """The question to show: a short one with an answer of three to six lines, in the middle of those there are.

    Chosen by its shape alone: picking the best answer would promise more than the figures above hold.
    """
    short = [
        i
        for i, answer in enumerate(after.answers)
        if 3 <= len(answer.splitlines()) <= 6 and len(questions[i]) < 260 and max(map(len, answer.splitlines())) < 90
    ]
    return short[len(short) // 2] if short else 0


def ask(model: str) -> str:
    """A command line that puts a question to the model."""
    program = sys.argv[0] if sys.argv[0].startswith(".venv") else "truetune"
    question = 'def is_empty(path):\n    """Return True if the file at path has no content."""'
    return f"{program} generate --model {model} --prompt '{question}'"


def _code(text: str, title: str) -> Panel:
    lines = text.splitlines()
    shown = "\n".join(lines[:12] + (["…"] if len(lines) > 12 else []))
    return Panel(Syntax(shown, "python", background_color="default", word_wrap=True), title=title, box=box.ROUNDED)
