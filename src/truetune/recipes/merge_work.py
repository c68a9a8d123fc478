"""Writing what a merge was planned to be, and saying so; nothing of it imports torch unless the plan does."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import truetune
from truetune.config.merge import MergeConfig
from truetune.errors import counted
from truetune.export.merge import Change, MergeReport, merge_checkpoint
from truetune.export.new_folder import check_out
from truetune.recipes.adapter_base import Named, identity_of
from truetune.recipes.artefacts import note_artefact
from truetune.recipes.merge_beside import extra_files
from truetune.recipes.merge_forecast import forecast
from truetune.train.log import Screen
from truetune.train.memory import peak_mb

if TYPE_CHECKING:
    from truetune.adapters.files import AdapterFile
    from truetune.export.onto import Drift


@dataclass(frozen=True, kw_only=True)
class Work:
    """A merge that is planned.

    Attributes:
        name: of the base, as the user gave it, or the adapters name it.
        file: the adapter, or what several are together.
        folders: of the adapters that were given.
        onto, drift: as in ``merge_plan.MergePlan``.
        tokenizer: its files with the tokens that the adapter brings.
    """

    name: str
    base: Path
    file: Named
    folders: Sequence[Path]
    edits: Mapping[str, Change]
    config_updates: Mapping[str, Any] = field(default_factory=dict)
    drop: tuple[str, ...] = ()
    onto: Literal["base", "original", "dequantized"] = "base"
    drift: Drift | None = None
    tokenizer: Mapping[str, bytes | Path] = field(default_factory=dict)


def write(work: Work, config: MergeConfig, screen: Screen) -> dict[str, Any]:
    """Write the model; returns what ``--json`` prints."""
    how = f" ({config.combine})" if len(work.folders) > 1 else ""
    what = counted(len(work.edits), "tensor changes", "tensors change")
    screen.say("merge", f"{' + '.join(config.adapter)} → {work.name}{how}: {what}")
    _say_consequences(work.file, work.config_updates, screen)
    out, recipe = Path(config.out).expanduser(), config.recipe()
    check_out(work.base, out)
    screen.note(str(ahead := forecast(work.base, out, work.edits, packed=bool(work.drift or recipe))))
    dense = out if recipe is None else out.with_name(f".{out.name}.{os.getpid()}.dense")
    with _kept_if_stopped(out, screen), screen.bar("writing") as progress:
        report = _merged(work, config, dense, progress)
    _say_earlier_attempts(out, report.kept, screen)
    if recipe:
        from truetune.recipes.merge_model import pack

        pack(dense, out, recipe, config, screen, drift=work.drift)
    _say_done(work, config, report, screen)
    if not config.combines:
        note_artefact(work.file.folder, out)
    result = _told(work, config, report) | {
        "forecast": {"ram_mb": round(ahead.ram_mb, 1), "disk_mb": round(ahead.disk_mb, 1), "seconds": ahead.seconds},
    }
    if config.verify:
        from truetune.recipes.verify import after_merge

        # Planned by files alone, or with the adapter read whole: what asks for a proof is the latter.
        proof = after_merge(cast("AdapterFile", work.file), config.out, work.name, allowed=config.allowed)
        result |= {"verify": proof["verdict"], "exit_code": proof["exit_code"]}
    return result


def _merged(work: Work, config: MergeConfig, dense: Path, progress: Callable[[int, int], None]) -> MergeReport:
    """Writes the merged weights and what belongs beside them to ``dense``."""
    # A packed base's drift is summed up over all of its layers, so that it starts anew each time.
    starts_anew = config.recipe() or work.drift
    settings = f"{truetune.__version__} {work.onto} {config.how}"
    return merge_checkpoint(
        work.base,
        dense,
        work.edits,
        drop=work.drop,
        config_updates=work.config_updates,
        extra_files={**work.tokenizer, **extra_files(work.base, work.file)},
        max_shard_bytes=int(config.max_shard_gb * 1e9),
        progress=progress,
        identity="" if starts_anew else identity_of(work.folders, settings),
    )


def _say_done(work: Work, config: MergeConfig, report: MergeReport, screen: Screen) -> None:
    changed = counted(report.edited + report.added, "tensor")
    screen.say("done", f"{config.out}: {report.nbytes / 1e6:,.0f} MB, {changed} changed, {report.copied} copied as "
               f"they are · peak {peak_mb():,.0f} MB")  # fmt: skip
    if work.drift:
        screen.note(f"the packed layers are within {work.drift.relative:.2%} of the model as it was trained "
                    f"(merged onto the {work.onto} weights)")  # fmt: skip


def _told(work: Work, config: MergeConfig, report: MergeReport) -> dict[str, Any]:
    return {
        "out": config.out,
        "onto": work.onto,
        "drift": work.drift.relative if work.drift else None,
        "drift_packed": work.drift.repacked if work.drift else None,
        "changed": report.edited + report.added,
        "copied": report.copied,
        "bytes": report.nbytes,
        "peak_mb": round(peak_mb(), 1),
        "kept": report.kept,
    }


def _say_consequences(file: Named, changed: Mapping[str, Any], screen: Screen) -> None:
    """What of the merged model is not as a user of the base knows it; ``changed`` is that of its config."""
    if file.card and file.card.get("template", "") is None:
        screen.note("the adapter was trained on bare text, without a chat template; one that the base has stays with "
                    "the model, which was not trained on it: generate --template none")  # fmt: skip
    if "tie_word_embeddings" in changed:
        screen.note("the head was tied to the embedding table; the adapter changed one of the two, so both are written")


def _say_earlier_attempts(out: Path, kept: int, screen: Screen) -> None:
    if kept:
        screen.note(f"{kept} weight files were finished by an earlier attempt, and were kept")
    for left in sorted(out.parent.glob(f".{out.name}.*.partial")):
        screen.note(f"{left} is left of another merge that was killed: remove it, or repeat that merge")


@contextlib.contextmanager
def _kept_if_stopped(out: Path, screen: Screen) -> Iterator[None]:
    """Say, when the user stops a merge, what of it is not lost."""
    try:
        yield
    except KeyboardInterrupt:
        whole = [path for path in out.parent.glob(f".{out.name}.*.partial/*.safetensors") if path.name[0] != "."]
        if whole:
            screen.note(f"{len(whole)} finished weight files are kept in {whole[0].parent}: the same command goes on "
                        "from there")  # fmt: skip
        raise
