"""``truetune preview``: the data as the loss will see it, and whether a run would take it.

Everything here is made by ``recipes.data.prepare_sft``, which training calls: there is no second rendering that could
differ. What would stop a run (faulty rows, rows over the limit) is said as the run would say it, and the rows are then
shown as if it had been told to leave the faulty ones out.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from truetune.checkpoint.atomic import write_text
from truetune.config.preview import PreviewConfig, spans_of
from truetune.config.resolve import Resolved
from truetune.config.sft import SFTConfig
from truetune.data.pack import group
from truetune.data.plan import StepPlan
from truetune.data.statistics import fill_rate, tally, token_facts
from truetune.errors import ConfigError, DataError, OutputError, counted
from truetune.models import load
from truetune.models.tokenizer import ChatTokenizer
from truetune.recipes import new_tokens, plan_report
from truetune.recipes.data import Prepared, prepare_sft
from truetune.recipes.preview_page import page
from truetune.recipes.preview_rows import Gallery, Shown
from truetune.recipes.preview_screen import Painter
from truetune.train.log import Screen

_SHOWN, _ON_PAGE = 3, 200  # rows, where nobody says
_ANY = 10**12  # more faulty rows than a file can have
_STEPS = 200  # whose packing is looked at
_NAMED = 8  # lines of a refusal that a verdict repeats


class _Silent(Screen):
    """Says nothing: what it would say was said before."""

    def __init__(self) -> None:
        super().__init__()
        self.console.quiet = True


class _Output(Console):
    """Standard output; whoever reads it may go, and its exit code of 1 would be an answer here."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def run(resolved: Resolved[PreviewConfig]) -> dict[str, Any]:
    """Show the rows and figures; returns what ``--json`` prints, ``exit_code`` 1 where a run would refuse the data.

    Raises:
        TruetuneError: a setting, file or template without which there is nothing to show.
    """
    config, screen = resolved.config, Screen()
    where = page_path(config.html) if config.html else None
    model_config = load.load_config(config.model, revision=config.revision)
    tokenizer = ChatTokenizer.load(config.model, revision=config.revision)
    max_length = load.usable_length(model_config, config.max_length)
    training = config.training()
    new_tokens.admit(training, tokenizer, model_config, screen)
    most = load.context_length(model_config)
    make = functools.partial(prepare_sft, tokenizer=tokenizer, max_length=max_length, most=most)
    prepared, refusal = prepare(training, make, screen)
    facts = summarise(config, prepared, max_length, refusal)
    gallery = Gallery(prepared, tokenizer)
    chosen = choose(config, gallery, screen)
    painter = Painter(_Output(highlight=False, soft_wrap=True))
    rows = [gallery.show(number, why) for number, why in chosen.items()]
    if any(not row.reject for row in rows):
        painter.legend()
    for row in rows:
        painter.row(row)
    painter.summary(facts)
    if where:
        _write_page(where, config, gallery, facts, screen)
    return facts | {"shown": [_as_json(row) for row in rows], "exit_code": 1 if refusal else 0}


def prepare(config: SFTConfig, make: Callable[..., Prepared], screen: Screen) -> tuple[Prepared, DataError | None]:
    """The data of a run with these settings; and where a run would refuse it, why, and the data without faulty rows."""
    try:
        return make(config, screen=screen), None
    except DataError as refusal:
        lenient = config.model_copy(
            update={
                "max_bad_rows": _ANY,
                "on_overlong": "drop" if config.on_overlong in ("auto", "error") else config.on_overlong,
            }
        )
        try:
            return make(lenient, screen=_Silent()), refusal
        except DataError:
            raise refusal from None


def summarise(config: PreviewConfig, prepared: Prepared, max_length: int, refusal: DataError | None) -> dict[str, Any]:
    """All figures, as JSON has them."""
    report, template = prepared.report, prepared.template
    return {
        "rows": {name: report[name] for name in ("read", "used", "rejected")},
        "train": token_facts(prepared.train),
        "held_out": token_facts(prepared.held_out) if prepared.held_out else None,
        "max_length": max_length,
        "truncated": report["truncated"],
        "dropped": report["dropped"],
        "repeats": report["repeats"],
        "scripts": report["scripts"],
        "code_rows": report["code_rows"],
        "packing": packing_facts(config, prepared),
        "template": {"name": template.name, "sha256": template.digest} if template else None,
        "data_sha256": prepared.digest,
        "verdict": _verdict(refusal),
        "refusal": refusal.message if refusal else None,
    }


def _verdict(refusal: DataError | None) -> str:
    """What a run would say, with the first of the rows that it would name."""
    if refusal is None:
        return "truetune sft would train on this"
    lines = [f"truetune sft would refuse this: {refusal.message}"]
    for label, text in refusal.notes:
        named, lead = text.split("\n"), f"{label}: " if label else ""
        lines += [lead + part for part in named[:_NAMED]] + ["…"] * (len(named) > _NAMED)
    return "\n".join(lines)


def packing_facts(config: PreviewConfig, prepared: Prepared) -> dict[str, Any]:
    """How full micro-batches are: all rows packed at once, and step by step as a run does it."""
    micro_tokens = plan_report.micro_tokens_for(prepared, config.micro_tokens)
    plan = StepPlan.build(
        prepared.train, batch_size=config.batch_size, micro_tokens=micro_tokens, packing=config.packing is not False,
        seed=config.seed, epochs=1.0, max_steps=None,
    )  # fmt: skip
    if not plan.packing:
        return {"packed": False, "micro_tokens": micro_tokens, "batch_size": config.batch_size,
                "fill": round(plan_report.fill(plan), 4)}  # fmt: skip
    steps = [prepared.train.lengths_of(plan.examples(step)) for step in range(min(plan.steps, _STEPS))]
    rooms = sum(len(group(step, micro_tokens, packing=True)) for step in steps) * micro_tokens
    return {
        "packed": True,
        "micro_tokens": micro_tokens,
        "batch_size": config.batch_size,
        "fill": round(fill_rate(tally(prepared.train), micro_tokens), 4),
        "step_fill": round(sum(map(sum, steps)) / rooms, 4),
    }


def choose(config: PreviewConfig, gallery: Gallery, screen: Screen) -> dict[int, str]:
    """The rows to show by number, with why where there is a reason.

    Raises:
        ConfigError: none of the rows that were asked for is there.
    """
    if config.worst:
        return gallery.worst()
    if config.rows is None:
        count = config.sample if config.sample is not None else _SHOWN
        return dict.fromkeys(gallery.sample(count), "")
    spans = spans_of(config.rows)
    found = gallery.named(spans)
    if not found:
        raise ConfigError(
            f"--rows {config.rows}: there is no such row",
            ("expected", f"numbers up to {max(origin.row for origin in gallery.origins()):,}, counted from 1"),
        )
    if any(first == 0 for first, _ in spans):
        screen.warn("--rows: there is no row 0; rows are counted from 1, as in every report")
    return dict.fromkeys(found, "")


def page_path(name: str) -> Path:
    """Where the page goes; its folder is made.

    Raises:
        OutputError: a folder, or a place that can't be written.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        raise OutputError(f"--html {name}: a folder", ("expected", "the name of the page, such as preview.html"))
    with _writing(name):
        path.parent.mkdir(parents=True, exist_ok=True)
    return path


@contextlib.contextmanager
def _writing(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"--html {name}: can't be written: {error.strerror or error}",
            ("way out", "another folder, or more room on this disk"),
        ) from None


def _write_page(path: Path, config: PreviewConfig, gallery: Gallery, facts: dict[str, Any], screen: Screen) -> None:
    wide = config.rows is None and config.sample is None and not config.worst
    chosen = dict.fromkeys(gallery.sample(_ON_PAGE), "") if wide else choose(config, gallery, _Silent())
    if wide:
        chosen |= gallery.worst()
    title = ", ".join(Path(name).name for name in config.data)
    rows = [gallery.show(number, why) for number, why in sorted(chosen.items())]
    text = page(title, facts, rows, total=len(gallery))
    with _writing(str(path)):
        write_text(path, text)
    screen.say("page", f"{path}  {len(rows):,} of {counted(len(gallery), 'row')} · {len(text.encode()) / 1e3:,.0f} KB")


def _as_json(row: Shown) -> dict[str, Any]:
    origin = {"file": row.origin.file, "row": row.origin.row, "part": row.part, "why": row.why}
    if row.reject:
        return origin | {"reason": row.reject.reason, "detail": row.reject.detail, "raw": row.reject.raw}
    tokens = [
        {"ids": piece.ids, "text": piece.text, "trained": piece.trained, "kind": piece.kind} for piece in row.pieces
    ]
    return origin | {"length": row.length, "trained": row.trained, "tokens": tokens}
