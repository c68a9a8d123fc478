"""``truetune merge``: fold adapters into their base, tensor by tensor, or make one adapter of several."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import truetune
from truetune.adapters import files
from truetune.config.merge import MergeConfig
from truetune.config.quant import QuantRecipe
from truetune.config.resolve import Resolved
from truetune.data.template import with_default_system
from truetune.errors import ModelError
from truetune.export.merge import merge_checkpoint
from truetune.export.new_folder import check_out
from truetune.export.onto import Drift
from truetune.export.quantize import quantize_checkpoint
from truetune.models import load
from truetune.models.tokenizer import ChatTokenizer
from truetune.recipes import merge_adapters
from truetune.recipes.adapter import check_base
from truetune.recipes.artefacts import note_artefact
from truetune.recipes.merge_forecast import forecast, identity_of
from truetune.recipes.merge_plan import config_of, plan_merge
from truetune.recipes.new_tokens import files_of, tokenizer_of
from truetune.train.log import Screen
from truetune.train.memory import peak_mb


def run(resolved: Resolved[MergeConfig]) -> dict[str, Any]:
    """Merge as the config says; returns what ``--json`` prints."""
    config, screen = resolved.config, Screen()
    named = load.local_copy(config.model, revision=config.revision) if config.model else None
    parents = merge_adapters.read_all(config)
    name = config.model or merge_adapters.named_base(parents)
    base = named or load.local_copy(name, revision=config.revision)
    config = config.model_copy(update={"model": name})
    for parent in parents.values():
        check_base(parent, name, base, allowed=config.allowed)
    if config.to == "adapter":
        return merge_adapters.run(config, parents, load.load_config(str(base)), screen)
    return _into_base(config, parents, name, base, screen)


def _into_base(
    config: MergeConfig, parents: Mapping[str, files.AdapterFile], name: str, base: Path, screen: Screen
) -> dict[str, Any]:
    """Write a model: the base under ``name`` with one adapter in it, or with what several are together."""
    file = next(iter(parents.values()))
    model_config = config_of(config, file, base)
    if config.combines:
        file = merge_adapters.combined(config, parents, model_config, screen)
    if config.verify:
        from truetune.recipes.verify import check_provable  # which imports all that answers are made with

        check_provable(str(file.folder), name)
    plan = plan_merge(config, file, base, model_config)
    changes = plan.changes
    how = f" ({config.combine})" if len(parents) > 1 else ""
    screen.say("merge", f"{' + '.join(config.adapter)} → {name}{how}: {len(changes.edits)} tensors change")
    _say_consequences(file, changes.config, screen)
    out = Path(config.out).expanduser()
    recipe = config.recipe()
    check_out(base, out)
    screen.note(str(ahead := forecast(base, out, changes.edits, packed=bool(plan.drift or recipe))))
    # A packed base's drift is summed up over all of its layers, so that it starts anew each time.
    settings = f"{truetune.__version__} {plan.onto} {config.how}"
    folders = [parent.folder for parent in parents.values()]
    identity = "" if recipe or plan.drift else identity_of(folders, settings)
    dense = out if recipe is None else out.with_name(f".{out.name}.{os.getpid()}.dense")
    with _kept_if_stopped(out, screen), screen.bar("writing") as progress:
        report = merge_checkpoint(
            base,
            dense,
            changes.edits,
            drop=plan.drop,
            config_updates=changes.config,
            extra_files=tokenizer_files(config, file, screen) | extra_files(base, file),
            max_shard_bytes=int(config.max_shard_gb * 1e9),
            progress=progress,
            identity=identity,
        )
    _say_earlier_attempts(out, report.kept, screen)
    if recipe:
        _pack(dense, out, recipe, config, screen, drift=plan.drift)
    screen.say("done", f"{config.out}: {report.nbytes / 1e6:,.0f} MB, {report.edited + report.added} tensors changed, "
               f"{report.copied} copied as they are · peak {peak_mb():,.0f} MB")  # fmt: skip
    if plan.drift:
        screen.note(f"the packed layers are within {plan.drift.relative:.2%} of the model as it was trained "
                    f"(merged onto the {plan.onto} weights)")  # fmt: skip
    if not config.combines:
        note_artefact(file.folder, out)
    result = {
        "out": config.out,
        "onto": plan.onto,
        "drift": plan.drift.relative if plan.drift else None,
        "drift_packed": plan.drift.repacked if plan.drift else None,
        "changed": report.edited + report.added,
        "copied": report.copied,
        "bytes": report.nbytes,
        "peak_mb": round(peak_mb(), 1),
        "forecast": {"ram_mb": round(ahead.ram_mb, 1), "disk_mb": round(ahead.disk_mb, 1), "seconds": ahead.seconds},
        "kept": report.kept,
    }
    if config.verify:
        from truetune.recipes.verify import after_merge

        proof = after_merge(str(file.folder), config.out, name, allow_mismatch=sorted(config.allowed))
        result |= {"verify": proof["verdict"], "exit_code": proof["exit_code"]}
    return result


def _say_consequences(file: files.AdapterFile, changed: Mapping[str, Any], screen: Screen) -> None:
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


def _pack(
    dense: Path, out: Path, recipe: QuantRecipe, config: MergeConfig, screen: Screen, *, drift: Drift | None
) -> None:
    """Pack the merged model, and remove the dense one that was written on the way."""
    try:
        model_config = load.load_config(str(dense))
        dtype = load.checkpoint_dtype(model_config)
        model = load.skeleton(model_config, dtype=dtype)
        with screen.bar("packing") as progress:
            report = quantize_checkpoint(
                dense,
                out,
                model,
                recipe,
                dtype=dtype,
                max_shard_bytes=int(config.max_shard_gb * 1e9),
                progress=progress,
            )
    finally:
        shutil.rmtree(dense, ignore_errors=True)
    far = f"; they are within {drift.repacked:.2%} of the model as it was trained" if drift and drift.repacked else ""
    screen.note(f"packed ({recipe}): {report.nbytes / 1e6:,.0f} MB, which changed the merged weights by "
                f"{report.relative_error:.1%} of their norm{far}")  # fmt: skip


def tokenizer_files(config: MergeConfig, file: files.AdapterFile, screen: Screen) -> dict[str, bytes | Path]:
    """Those of the tokenizer with the tokens that the adapter brings; none where it brings none."""
    if not file.settings.token_rows:
        return {}
    own = ChatTokenizer.load(str(config.model), revision=config.revision)
    before = len(own.hf)
    tokenizer = tokenizer_of(file, own, screen)
    return files_of(tokenizer) if len(tokenizer.hf) > before else {}


def extra_files(base: Path, file: files.AdapterFile) -> dict[str, bytes | Path]:
    """The template that trained the adapter, and the stop tokens it taught, go with the merged model."""
    extra: dict[str, bytes | Path] = {}
    template, system = file.card.get("template"), file.card.get("system")
    # The base's own is there already, unless it was trained with a system message or the date of a day.
    if template and (template["name"] != "own" or system is not None or file.card.get("date")):
        extra["chat_template.jinja"] = with_default_system(template["source"], system).encode()
    generation = _generation(base)
    known = generation.get("eos_token_id")
    known = known if isinstance(known, list) else [known] if known is not None else []
    if new := [stop for stop in file.card.get("stop_ids", ()) if stop not in known]:
        extra["generation_config.json"] = json.dumps(generation | {"eos_token_id": [*known, *new]}, indent=2).encode()
    return extra


def _generation(base: Path) -> dict[str, Any]:
    """The base's generation settings; where it has none, what transformers would take from its config."""
    for name in ("generation_config.json", "config.json"):
        if (base / name).is_file():
            try:
                found: dict[str, Any] = json.loads((base / name).read_text(encoding="utf-8"))
            except ValueError as error:
                raise ModelError(f"{base / name}: not valid JSON: {error}") from None
            special = ("bos_token_id", "eos_token_id", "pad_token_id")
            return found if name == "generation_config.json" else {k: found[k] for k in special if k in found}
    return {}
