"""What a run says about itself once it is over: ``report.md``, ``loss.png``, and the figures behind them."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

from truetune.checkpoint.atomic import writing
from truetune.config.methods import METHODS
from truetune.errors import counted
from truetune.recipes.plan_report import describe_method
from truetune.recipes.setup import Setup


def report(setup: Setup, card: dict[str, Any], losses: dict[str, list[tuple[int, float]]], where: Path) -> str:
    """``report.md``: what was trained on what, before and after, and how to use it."""
    config, data, metrics = setup.config, setup.prepared.report, card["metrics"]
    rejected = ", ".join(f"{n} {reason}" for reason, n in data["rejected"].items()) or "none"
    lines = [
        f"# {where.parent.name}",
        "",
        f"- base: `{config.model}`"
        + (f", weights {card['base']['weights_sha256'][:12]}" if card["base"]["weights_sha256"] else ""),
        f"- method: {config.method}, {describe_method(config.method_settings())}",
        f"- data: {', '.join(config.data)}; {counted(data['read'], 'row')} read, {data['used']:,} used, "
        f"rejected: {rejected}",
        f"- repeats: {_repeats(data)}",
        f"- tokens: {data['tokens']:,} in the data, {data['trained_tokens']:,} of them trained",
        f"- template: {card['template']['name'] if card['template'] else 'none (plain text)'}",
        f"- steps: {metrics['steps']:,}; {counted(metrics['tokens'], 'token')} seen, padding not counted",
        "",
        "| | before | after |",
        "|---|---|---|",
        f"| training loss | {_at(losses['train'], 0)} | {_at(losses['train'], -1)} |",
        f"| held-out loss | {_number(metrics['held_out_loss_before'])} | {_number(metrics['held_out_loss'])} |",
        "",
        "How to use it:",
        "",
        "```",
    ]
    if not config.trains_model:
        lines.append(f"truetune generate --model {config.model} --adapter {where} --prompt '…'")
        if METHODS[config.method].mergeable:
            lines.append(f"truetune merge --model {config.model} --adapter {where} --out merged")
    else:
        lines.append(f"truetune generate --model {where} --prompt '…'")
    return "\n".join([*lines, "```", "", *_again(card, config.command, where.parent), ""])


def _again(card: dict[str, Any], command: str, out: Path) -> list[str]:
    """How to get the same result once more, and what that depends on."""
    facts = card["facts"]
    machine = facts.get("environment") or {}
    return [
        "The same result once more, to the bit on a processor of the same kind:",
        "",
        "```",
        f"truetune {command} --config {out / 'run.yaml'} --out again",
        "```",
        "",
        f"- with {', '.join(f'{name} {number}' for name, number in card['versions'].items())}",
        f"- computed in {facts.get('compute')}, kernels: {machine.get('kernels')}, threads: {machine.get('threads')}, "
        f"tokens per micro-batch: {facts.get('micro_tokens')}",
        f"- from weights with sha256 {card['base']['weights_sha256'] or '(not known)'}",
        *(f"- from `{name}` with sha256 {digest or '(not known)'}" for name, digest in card["data"]["files"].items()),
    ]


def _repeats(data: dict[str, Any]) -> str:
    """What the rows repeat, and what of the held-out rows is trained on; with the rows that were cut."""
    found, cut = data["repeats"], data["truncated"]
    words = f"{counted(found['exact'], 'row')} to the letter, {found['near']:,} nearly"
    if data["held_out"]:
        words += f"; of the held-out rows {counted(found['leaked'], 'is', 'are')} trained on"
        words += f", {found['near_leaked']:,} nearly"
    if cut["rows"]:
        words += f"; {counted(cut['rows'], 'row was', 'rows were')} cut by {counted(cut['tokens'], 'token')}"
        words += f", {cut['without_stop']:,} of them within an answer"
    if data["dropped"]:
        dropped = [f"{name} from {counted(n, 'row')}" for name, n in data["dropped"].items()]
        words += f"; dropped, as asked: {', '.join(dropped)}"
    return words


def plot(losses: dict[str, list[tuple[int, float]]], path: Path) -> None:
    """Training and held-out curves as a picture, where matplotlib is installed (the ``plot`` extra)."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=120)
    for name, points in losses.items():
        if points:
            axes.plot(*zip(*points, strict=True), label=name, marker="o" if len(points) < 30 else None)
    axes.set(xlabel="step", ylabel="loss (nats per trained token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    with writing(path.parent):
        figure.savefig(path)
    pyplot.close(figure)


def read_losses(log: Path) -> dict[str, list[tuple[int, float]]]:
    """``(step, loss)`` of every logged step (``train``) and evaluation (``held out``)."""
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return {
        "train": [(row["step"], row["loss"]) for row in rows if "loss" in row],
        "held out": [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row],
    }


def speed(log: Path) -> float | None:
    """The median of the logged tokens per second; padding is not counted, nor are evaluations."""
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return median(row["tok_s"] for row in rows if "tok_s" in row) if any("tok_s" in row for row in rows) else None


def _at(points: list[tuple[int, float]], index: int) -> str:
    return _number(points[index][1]) if points else "–"


def _number(value: float | None) -> str:
    return f"{value:.4f}" if value is not None else "–"
