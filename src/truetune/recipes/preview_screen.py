"""A preview on the terminal: rows in colour, or with marks where there is none; then the figures of all rows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.text import Text

from truetune.data.statistics import Bar
from truetune.errors import counted
from truetune.recipes.plan_report import stops_said
from truetune.recipes.preview_rows import Piece, Shown, visible

_HEAD, _TAIL = 400, 100  # pieces of a very long row that are shown
_BAR_WIDTH = 40

# Neighbouring tokens differ a little, so that each can be told from the next.
_TRAINED = ("bold #d9fbe3 on #14532d", "bold #d9fbe3 on #1f7a43")
_CONTEXT = ("", "dim")
_SPECIAL, _STOP, _STOP_OUTSIDE = "bold magenta", "bold white on #b91c1c", "bold yellow"


class Painter:
    """Writes to one console; decides once whether it has colours."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.colour = console.is_terminal and not console.no_color and console.color_system is not None

    def legend(self) -> None:
        """What the marks mean."""
        line = Text("reading  ")
        if self.colour:
            line.append("context", _CONTEXT[0]).append("  ")
            line.append("trained", _TRAINED[0]).append(" ").append("tokens", _TRAINED[1]).append("  ")
            line.append("special", _SPECIAL).append("  ").append("stop, trained ■", _STOP).append("  ")
            line.append("stop, not trained □", _STOP_OUTSIDE)
        else:
            line.append("⟦trained⟧  <special>  stop token: ■ trained, □ not")
        self.console.print(line.append("  ↵ line break"))

    def row(self, shown: Shown) -> None:
        """One row under a line that names it."""
        self.console.print(Text("── ", "dim").append(_title(shown), "not dim bold"))
        if shown.reject:
            self.console.print(Text(f"left out: {shown.reject.reason}", "bold red"))
            self.console.print(Text(visible(shown.reject.detail)))
            if shown.reject.raw:
                self.console.print(Text(visible(shown.reject.raw), "dim"))
            return
        pieces, dropped = shown.pieces, len(shown.pieces) - _HEAD - _TAIL
        if dropped <= 0:
            self.console.print(self._tokens(pieces))
            return
        self.console.print(self._tokens(pieces[:_HEAD]))
        self.console.print(Text(f"… {dropped:,} tokens that are not shown …", "italic dim"))
        self.console.print(self._tokens(pieces[-_TAIL:]))

    def _tokens(self, pieces: Sequence[Piece]) -> Text:
        line = Text(overflow="fold", no_wrap=False)
        if self.colour:
            for number, piece in enumerate(pieces):
                line.append(_marked(piece), _style(piece, number))
            return line
        for trained, run in groupby(pieces, lambda piece: piece.trained):
            text = "".join(map(_marked, run))
            line.append(f"⟦{text}⟧" if trained else text)
        return line

    def summary(self, facts: dict[str, Any]) -> None:
        """All figures; ``facts`` as ``preview.summarise`` makes them."""
        self.console.print(Text("──", "dim"))
        for label, lines in summary_lines(facts):
            for number, text in enumerate(lines):
                self.console.print(Text(f"{'' if number else label:<9}", "bold").append(text, "not bold"))
            if label == "lengths":
                self._bars(facts["train"]["histogram"])

    def _bars(self, bars: Sequence[dict[str, Any]]) -> None:
        shown = [Bar(bar["from"], bar["to"], bar["rows"]) for bar in bars]
        width = max((len(str(bar)) for bar in shown), default=0)
        most = max((bar.rows for bar in shown), default=1)
        for bar in shown:
            filled = "▇" * round(_BAR_WIDTH * bar.rows / most) or ("▏" if bar.rows else "")
            self.console.print(Text(f"         {bar!s:>{width}} ").append(filled, "green").append(f" {bar.rows:,}"))


def _title(shown: Shown) -> str:
    size = ""
    if not shown.reject:
        share = f"{shown.trained / max(1, shown.length):.0%}"
        size = f" · {counted(shown.length, 'token')}, {shown.trained:,} trained ({share})"
    held = " · held out" if shown.part == "held_out" else ""
    return f"{shown.origin}{size}{held}" + (f" · {shown.why}" if shown.why else "")


def _marked(piece: Piece) -> str:
    return visible(piece.text) + (("■" if piece.trained else "□") if piece.kind == "stop" else "")


def _style(piece: Piece, number: int) -> str:
    if piece.kind == "stop":
        return _STOP if piece.trained else _STOP_OUTSIDE
    if piece.kind == "special":
        return _SPECIAL
    return (_TRAINED if piece.trained else _CONTEXT)[number % 2]


def summary_lines(facts: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """The figures in words, by label: what the terminal prints and the page says."""
    train, rows, lengths = facts["train"], facts["rows"], facts["train"]["lengths"]
    held = facts["held_out"]
    left_out = ", ".join(f"{n:,} {reason}" for reason, n in rows["rejected"].items())
    cut = facts["truncated"]
    return [
        ("rows", [f"{rows['read']:,} read · {rows['used']:,} used" + (f" · left out: {left_out}" if left_out else "")
                  + (f" · {held['rows']:,} held out" if held else ""), *_dropped(facts["dropped"])]),
        ("tokens", [f"{train['tokens']:,} in {counted(train['rows'], 'row')} · {train['trained_tokens']:,} trained "
                    f"({train['trained_tokens'] / max(1, train['tokens']):.0%})"]),
        ("lengths", [f"half of the rows {lengths['p25']:,} to {lengths['p75']:,} tokens · median {lengths['median']:,} "
                     f"· 95 % up to {lengths['p95']:,} · longest {lengths['max']:,} of {facts['max_length']:,} allowed"
                     + (f" · {counted(cut['rows'], 'row')} cut by {counted(cut['tokens'], 'token')}"
                        if cut["rows"] else "")]),
        ("answers", [_answers(facts)]),
        ("repeats", _repeats(facts["repeats"], held)),
        ("written", [_written(facts)]),
        ("packing", [_packing(facts)]),
        ("template", [_template(facts)]),
        ("verdict", facts["verdict"].split("\n")),
    ]  # fmt: skip


def _dropped(dropped: dict[str, int]) -> list[str]:
    words = [f"{name.replace('_', ' ')} from {count:,}" for name, count in dropped.items()]
    return [f"dropped, as asked: {', '.join(words)}"] if words else []


def _answers(facts: dict[str, Any]) -> str:
    near_empty = facts["train"]["near_empty"]
    if not near_empty["count"]:
        return "none of a word or two"
    named = "; ".join(near_empty["rows"][:3]) + ("; …" if near_empty["count"] > 3 else "")
    rows = counted(near_empty["count"], "row trains", "rows train")
    return f"{rows} at most {near_empty['tokens']} tokens: {named}"


def _repeats(repeats: dict[str, Any], held: dict[str, Any] | None) -> list[str]:
    words = [f"{repeats['exact']:,} to the letter · {repeats['near']:,} nearly"]
    words += [f"{row} ~ {other} ({share:.0%})" for row, other, share in repeats["rows"]["near"][:3]]
    if held:
        words.append(f"held out and trained on: {repeats['leaked']:,} · nearly: {repeats['near_leaked']:,}")
        words += repeats["rows"]["leaked"][:3]
        words += [f"{row} ~ {other} ({share:.0%})" for row, other, share in repeats["rows"]["near_leaked"][:3]]
    return words


def _written(facts: dict[str, Any]) -> str:
    shares = ", ".join(f"{name} {share:.1%}" for name, share in facts["scripts"].items() if share >= 0.001)
    return f"letters: {shares or 'none'} · {counted(facts['code_rows'], 'row holds', 'rows hold')} code"


def _packing(facts: dict[str, Any]) -> str:
    packing = facts["packing"]
    if not packing["packed"]:
        return f"off: rows are padded, {packing['fill']:.1%} of what is computed is data"
    return (
        f"no padding · micro-batches of {packing['micro_tokens']:,} tokens: {packing['fill']:.1%} full with all rows "
        f"at once, {packing['step_fill']:.1%} within steps of {packing['batch_size']}"
    )


def _template(facts: dict[str, Any]) -> str:
    template = facts["template"]
    if not template:
        return "none: plain text, every token is trained"
    stops = stops_said(facts["truncated"])
    return f"{template['name']} ({template['sha256'][:8]}) · {stops}"
