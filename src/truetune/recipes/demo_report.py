"""The demo's last page: the table, one question side by side, and where the model is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.syntax import Syntax
from rich.table import Table

if TYPE_CHECKING:
    from truetune.recipes.demo import Contestant


def facts(
    before: Contestant, after: Contestant, merged: Contestant, questions: Sequence[str], *,
    parses: Callable[[str, str], bool],
) -> dict[str, Any]:  # fmt: skip
    """The figures, as ``--json`` prints them."""

    def good(answers: Sequence[str]) -> float:
        return sum(parses(q, a) for q, a in zip(questions, answers, strict=True)) / max(1, len(questions))

    live, folded = after.quality.logits, merged.quality.logits
    return {
        "perplexity": [round(c.quality.evaluation.perplexity, 3) for c in (before, after, merged)],
        "accuracy": [round(c.quality.evaluation.accuracy, 4) for c in (before, after, merged)],
        "parses": [round(good(c.answers), 4) for c in (before, after, merged)],
        "held_out_tokens": after.quality.evaluation.tokens,
        "merged_max_logit_difference": float((live - folded).abs().max()),
        "merged_top1_agreement": float((live.argmax(-1) == folded.argmax(-1)).float().mean()),
        "merged_same_answers": sum(a == b for a, b in zip(after.answers, merged.answers, strict=True)),
        "questions": len(questions),
        "dtype": str(after.speaker.model.dtype).removeprefix("torch."),
    }


def show(facts: dict[str, Any], before: Contestant, after: Contestant, questions: Sequence[str]) -> None:
    """Print the page to stdout."""
    console = Console(highlight=False)
    table = Table(box=box.SIMPLE_HEAD, title="held-out functions, never seen in pre-training or tuning")
    for heading, align in (("", "left"), ("base", "right"), ("with adapter", "right"), ("merged", "right")):
        table.add_column(heading, justify=align)  # type: ignore[arg-type]
    table.add_row("perplexity of the true body", *(f"{v:,.2f}" for v in facts["perplexity"]))
    table.add_row("next token right", *(f"{v:.1%}" for v in facts["accuracy"]))
    table.add_row("answers that are valid Python", *(f"{v:.0%}" for v in facts["parses"]))
    console.print(table)
    index = _example(before, after, questions)
    console.print("one question, two answers", style="bold")
    console.print(_code(questions[index], "the question"))
    halves = [_code(c.answers[index], name) for c, name in ((before, "base"), (after, "with adapter"))]
    console.print(Columns(halves, equal=True, expand=True) if console.width >= 100 else halves[0])
    if console.width < 100:
        console.print(halves[1])
    console.print(
        f"proof    merged against base + adapter ({facts['dtype']}): largest logit difference "
        f"{facts['merged_max_logit_difference']:.3g}, same first choice {facts['merged_top1_agreement']:.1%}, "
        f"same answer {facts['merged_same_answers']} of {facts['questions']}"
    )
    console.print(
        f"cost     {facts['seconds']:.0f} s in all, {facts['train_seconds']:.0f} s of it training at "
        f"{facts['tok_s']:,.0f} tokens/s · peak {facts['peak_mb'] / 1e3:.1f} GB"
    )
    console.print(f"model    {facts['merged']}")
    console.print(
        f"next     truetune generate --model {facts['merged']} --prompt "
        '\'def is_empty(path):\n    """Return True if the file at path has no content."""\''
    )


def _example(before: Contestant, after: Contestant, questions: Sequence[str]) -> int:
    """The question to show: among those the adapter answers in a few lines, the one with the longest docstring."""
    short = [i for i, a in enumerate(after.answers) if 2 <= len(a.splitlines()) <= 8 and len(questions[i]) < 400]
    return max(short or range(len(questions)), key=lambda i: (len(after.answers[i].splitlines()), -i))


def _code(text: str, title: str) -> Panel:
    lines = text.splitlines()
    shown = "\n".join(lines[:12] + (["…"] if len(lines) > 12 else []))
    return Panel(Syntax(shown, "python", background_color="default", word_wrap=True), title=title, box=box.ROUNDED)
