"""A preview as one self-contained page: no network, no library, light and dark, and no row can bring markup into it.

Every text is escaped, and the page's policy names the hashes of its own style and script: a browser runs nothing else.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from truetune.data.statistics import Bar
from truetune.recipes.preview_rows import Piece, Shown, visible
from truetune.recipes.preview_screen import summary_lines

_MOST = 2000  # pieces of one row on the page
_PARTS = {"train": "trained on", "held_out": "held out", "rejected": "left out"}
_WIDTH, _HEIGHT, _FOOT = 560, 230, 34  # of the histogram, in its own units


def page(title: str, facts: dict[str, Any], rows: Sequence[Shown], *, total: int) -> str:
    """The whole page.

    Args:
        title: what the data is called.
        facts: as ``preview.summarise`` makes them.
        rows: those that the page shows, in order.
        total: how many rows there are.
    """
    style, script = _asset("page.css"), _asset("page.js")
    return Template(_asset("page.html")).substitute(
        title=_safe(title),
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hash=_hash(script),
        verdict=_safe(facts["verdict"]),
        verdict_kind="bad" if facts["refusal"] else "good",
        cards="".join(_card(*card) for card in _cards(facts)),
        histogram=_histogram(facts["train"]["histogram"]),
        summary="".join(_definition(label, lines) for label, lines in summary_lines(facts) if label != "verdict"),
        shown=f"{len(rows):,}",
        total=f"{total:,}",
        parts=_filters(rows),
        rows="\n".join(map(_row, rows)),
    )


def _asset(name: str) -> str:
    return (files("truetune") / "assets" / "preview" / name).read_text(encoding="utf-8")


def _hash(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def _safe(text: str) -> str:
    return escape(visible(text)).replace("↵\n", "\n")


def _cards(facts: dict[str, Any]) -> list[tuple[str, str]]:
    train, packing, repeats = facts["train"], facts["packing"], facts["repeats"]
    cards = [
        (f"{facts['rows']['used']:,}", "rows used"),
        (f"{sum(facts['rows']['rejected'].values()):,}", "rows left out"),
        (f"{train['tokens']:,}", "tokens to train on"),
        (f"{train['trained_tokens'] / max(1, train['tokens']):.0%}", "of them trained"),
        (f"{train['lengths']['median']:,}", "tokens in the median row"),
        (f"{train['lengths']['max']:,}", f"in the longest, of {facts['max_length']:,}"),
        (f"{repeats['exact']:,} + {repeats['near']:,}", "rows repeat + nearly"),
        (f"{packing['fill']:.1%}", "full when packed" if packing["packed"] else "data, the rest is padding"),
    ]
    if held := facts["held_out"]:
        cards[2:2] = [(f"{held['rows']:,}", "rows held out")]
        cards.append((f"{repeats['leaked']:,} + {repeats['near_leaked']:,}", "held out, trained on + nearly"))
    return cards


def _card(figure: str, words: str) -> str:
    return f'<div class="card"><strong>{_safe(figure)}</strong><span>{_safe(words)}</span></div>'


def _definition(label: str, lines: Sequence[str]) -> str:
    return f"<dt>{_safe(label)}</dt><dd>{'<br>'.join(map(_safe, lines))}</dd>"


def _histogram(bars: Sequence[dict[str, Any]]) -> str:
    """Bars as inline SVG; each tells its range and rows when pointed at."""
    shown = [Bar(bar["from"], bar["to"], bar["rows"]) for bar in bars]
    most, slot = max(bar.rows for bar in shown), _WIDTH / len(shown)
    room = _HEIGHT - _FOOT - 18
    drawn = []
    for number, bar in enumerate(shown):
        height = max(room * bar.rows / most, 1.5 if bar.rows else 0)
        left, top, middle = number * slot, _HEIGHT - _FOOT - height, (number + 0.5) * slot
        drawn.append(
            f'<g><title>{bar} tokens: {bar.rows:,} rows</title>'
            f'<rect x="{left + slot * 0.06:.1f}" y="{top:.1f}" width="{slot * 0.88:.1f}" height="{height:.1f}" rx="2"/>'
            + (f'<text class="value" x="{middle:.1f}" y="{top - 5:.1f}" text-anchor="middle">{bar.rows:,}</text>'
               if bar.rows else "")
            + f'<text x="{middle:.1f}" y="{_HEIGHT - _FOOT + 15}" text-anchor="middle">'
            f'{bar.first:,}{"+" if bar.last is None else ""}</text></g>'
        )  # fmt: skip
    caption = f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 3}" text-anchor="middle">tokens, from</text>'
    label = f"rows by their number of tokens, {shown[0]} to {shown[-1]}"
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{"".join(drawn)}{caption}</svg>'


def _filters(rows: Sequence[Shown]) -> str:
    there = {row.part for row in rows}
    return "".join(
        f'<label><input type="checkbox" value="{part}" checked>{words}</label>'
        for part, words in _PARTS.items()
        if part in there
    )


def _row(row: Shown) -> str:
    why = f'<span class="why">{_safe(row.why)}</span>' if row.why else ""
    head = f"{_safe(str(row.origin))}"
    if row.reject:
        raw = f"<pre>{_safe(row.reject.raw)}</pre>" if row.reject.raw else ""
        return (
            f'<article class="rejected" data-part="rejected"><h3>{head}<span class="reason">left out: '
            f"{_safe(row.reject.reason)}</span>{why}</h3><p>{_safe(row.reject.detail)}</p>{raw}</article>"
        )
    held = "<span>held out</span>" if row.part == "held_out" else ""
    size = f"{row.length:,} tokens, {row.trained:,} trained ({row.trained / max(1, row.length):.0%})"
    more = len(row.pieces) - _MOST
    cut = f'<span class="cut"> … {more:,} tokens that are not shown</span>' if more > 0 else ""
    return (
        f'<article data-part="{row.part}"><h3>{head}<span>{size}</span>{held}{why}</h3>'
        f'<div class="tokens">{"".join(map(_token, row.pieces[:_MOST]))}{cut}</div></article>'
    )


def _token(piece: Piece) -> str:
    ids = " ".join(map(str, piece.ids))
    title = f'title="{ids}"' if len(piece.ids) > 1 else f"title={ids}"
    text = escape(visible(piece.text)).replace("↵\n", '<span class="mark">↵</span>\n')
    if piece.kind == "stop":
        tag = "em" if piece.trained else "del"
        return f"<{tag} {title}>{text}</{tag}>"
    if piece.kind == "special":
        return f"<u class=t {title}>{text}</u>" if piece.trained else f"<u {title}>{text}</u>"
    tag = "b" if piece.trained else "i"
    return f"<{tag} {title}>{text}</{tag}>"
