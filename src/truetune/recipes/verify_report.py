"""The proof as a table for people, and as ``verify.json`` for machines."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from truetune.recipes.verify_compare import Finding

_COLUMNS = ("", "as", "prompts", "max |Δ|", "mean KL", "of training", "top 1", "answers", "ended", "held-out loss", "")
_MARKS = {"faithful": "[green]the same[/green]", "drift": "[red]drift[/red]", "unknown": "[yellow]can't tell[/yellow]"}

_BEFORE, _SHOWN = 12, 48  # characters of an example: before the place where texts part, and in all


def show(findings: Sequence[Finding], *, title: str) -> None:
    """Print the table and the reasons to stdout."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 132)
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    for number, heading in enumerate(_COLUMNS):
        table.add_column(heading, justify="left" if number in (0, 1, 10) else "right", overflow="fold")
    for finding in findings:
        table.add_row(*_cells(finding))
    console.print(table)
    for finding in findings:
        for reason in finding.reasons:
            console.print(f"{_called(finding)}: {reason}", soft_wrap=True, markup=False)
        for note in (*finding.notes, *(_examples(finding) if finding.verdict == "drift" else ())):
            console.print(f"{_called(finding)}: {note}", soft_wrap=True, markup=False)


def _examples(finding: Finding) -> Iterator[str]:
    """The first prompt and the first answer that became others, from shortly before the place where they part."""
    for what, example in finding.example.items():
        trained, found = example["trained"], example["found"]
        if trained == found:
            yield f"the {what} of {example['row']}: the same text, in other tokens"
        elif isinstance(found, str):
            part = next((i for i, pair in enumerate(zip(trained, found, strict=False)) if len(set(pair)) > 1), 1 << 30)
            at = max(0, min(part, len(trained), len(found)) - _BEFORE)
            was, became = (("…" if at else "") + text[at : at + _SHOWN] for text in (trained, found))
            yield f"the {what} of {example['row']} was {was!r}, and is {became!r}"


def facts(findings: Sequence[Finding], *, run: str, base: str, compute: str, code: int) -> dict[str, Any]:
    """``verify.json``, which is also what ``--json`` prints."""
    verdict = {0: "faithful", 1: "drift", 2: "unknown"}[code]
    artefacts = [_plain(asdict(finding)) for finding in findings]
    return {"run": run, "base": base, "compute": compute, "verdict": verdict, "exit_code": code, "artefacts": artefacts}


def _plain(value: Any) -> Any:
    """Without what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if key != "gaps"}  # one for each position
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and value in (float("inf"), float("-inf")) else value


def _called(finding: Finding) -> str:
    name = Path(finding.name).name or finding.name
    return name if finding.loader == "truetune" else f"{name} ({finding.loader})"


def _cells(finding: Finding) -> list[str]:
    found = finding.logits
    losses = finding.held_out_loss
    return [
        _called(finding),
        finding.kind,
        _ratio(finding.prompts),
        f"{found.max_delta:.2g}" if found else "–",
        f"{found.mean_kl:.2g}" if found else "–",
        f"{finding.effect_share:.2%}" if finding.effect_share is not None else "–",
        f"{found.top1:.1%}" if found else "–",
        _ratio(finding.answers),
        _ratio(finding.stopped) if finding.stopped and any(finding.stopped) else "–",
        f"{losses[0]:.4f} ({losses[0] - losses[1]:+.1g})" if losses else "–",
        _MARKS[finding.verdict],
    ]


def _ratio(pair: tuple[int, int] | None) -> str:
    return f"{pair[0]}/{pair[1]}" if pair else "–"
