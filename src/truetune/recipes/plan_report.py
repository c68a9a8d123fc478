"""The plan, said before the run: rows, tokens, steps, trained parameters, memory and time."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from truetune.adapters.partial import at_once
from truetune.adapters.virtual import virtual_ids
from truetune.checkpoint.atomic import write_text
from truetune.config.adapter import AdapterConfig
from truetune.config.methods import METHODS
from truetune.config.other_methods import Lisa
from truetune.config.quant import QuantRecipe
from truetune.data.pack import group
from truetune.data.plan import StepPlan
from truetune.errors import ModelError, NonFiniteError, counted
from truetune.models import load
from truetune.models.layers import decoder_layers
from truetune.models.precision import name_of
from truetune.ops.probe import gemm_rate
from truetune.quant.experts import QuantExperts
from truetune.recipes.continued import put_on
from truetune.recipes.data import Prepared
from truetune.recipes.memory_plan import MemoryPlan, copied_mb, memory_plan
from truetune.recipes.setup import Setup
from truetune.train.estimate import Estimate, count_parameters, flops_per_token, text_shape
from truetune.train.log import Screen
from truetune.train.memory import available_mb
from truetune.train.step import NonFiniteStepError

# Share of the measured matrix rate that a whole step reaches; the rest is attention, norms and memory traffic.
_STEP_EFFICIENCY = 0.3
# Attention of one short example in one layer, forward and backward, on two cores.
_SECONDS_PER_SEGMENT = 0.001


def outline(setup: Setup, screen: Screen) -> dict[str, Any]:
    """Print what will be trained on what, and return it. Targets are resolved on an empty model, so that a typo
    costs no loading."""
    config = setup.config
    _check_vocabulary(setup)
    _say_data(setup, screen)
    model = load.skeleton(setup.model_config, dtype=setup.precision.storage)
    base, _ = count_parameters(model)
    if recipe := stored_as(setup):
        load.plan_quantised(model, recipe, dtype=setup.precision.storage)
        if config.dry_run and (remark := load.stacks_remark(model)):  # else it is said when the model is loaded
            screen.warn(remark)
    copied = copied_mb(setup, model) if config.max_memory else None
    sites = put_on(setup, model)
    with at_once(model, config.method_settings(), seed=config.seed):
        return _planned(setup, model, screen, base=base, sites=sites, copied=copied)


def _planned(
    setup: Setup, model: Any, screen: Screen, *, base: int, sites: int, copied: float | None
) -> dict[str, Any]:
    """The part of the outline that depends on what is trained at the same time."""
    config, prepared = setup.config, setup.prepared
    everything, trained = count_parameters(model)
    packed = (
        "linear layers and experts" if any(isinstance(m, QuantExperts) for m in model.modules()) else "linear layers"
    )
    _say_model(setup, screen, base=base, trained=trained, sites=sites, packed=packed)
    plan = StepPlan.build(
        prepared.train.behind(virtual_ids(model)), batch_size=config.batch_size, seed=config.seed,
        micro_tokens=default_micro_tokens(setup), packing=config.packing is not False, epochs=config.epochs,
        max_steps=config.max_steps,
    )  # fmt: skip
    share = prepared.report["trained_tokens"] / max(1, prepared.report["tokens"])
    available = available_mb(setup.device)
    memory = memory_plan(
        setup, model, micro_tokens=_micro_tokens(plan), share=share, available=available, copied=copied
    )
    estimate = memory.estimate
    seconds = _seconds(setup, plan, everything, share)
    begun = f" from {setup.start.folder}" if setup.start else f" on top of {setup.on.folder}" if setup.on else ""
    screen.say(
        "plan",
        f"{counted(plan.steps, 'step')} of {counted(config.batch_size, 'example')}{begun} · "
        f"about {_duration(seconds)} · peak {estimate.total / 1e3:.1f} GB" + _of(config.max_memory, available),
    )
    if available is not None:
        _check_room(estimate, available, screen)
    _say_memory(memory, screen, layers=len(decoder_layers(model)))
    return {
        "steps": plan.steps,
        "examples": plan.total,
        "tokens": prepared.report["tokens"],
        "trained_tokens": prepared.report["trained_tokens"],
        "rows": {name: prepared.report[name] for name in ("read", "used", "rejected")},
        "parameters": base,
        "trainable_parameters": trained,
        **asdict(memory.economy),
        "memory_mb": {"weights": round(estimate.weights), "trained": round(estimate.trained),
                      "activations": round(estimate.activations), "peak": round(estimate.total)},
        "seconds": round(seconds, 1),
    }  # fmt: skip


def _check_room(estimate: Estimate, available: float, screen: Screen) -> None:
    """Warn of a plan that may not fit. Raises ModelError: what is trained alone, which nothing makes less, does not."""
    if estimate.trained > available:
        raise ModelError(
            f"what is trained takes {estimate.trained / 1e3:,.1f} GB with gradients and optimizer, and "
            f"{available / 1e3:,.1f} GB are free",
            ("way out", "less to train: a lower --rank, fewer --targets, another --method; or --optim adamw8bit"),
        )
    if estimate.total > available:
        screen.warn("this may not fit in memory: lower --micro-tokens or --max-length, or take a smaller model")


def _of(limit: str | None, available: float | None) -> str:
    """What a plan's peak is measured against."""
    if limit is not None:
        return f" of {limit} allowed"
    return f" of {available / 1e3:.0f} GB free" if available is not None else ""


def _say_memory(memory: MemoryPlan, screen: Screen, *, layers: int) -> None:
    economy = memory.economy
    if economy.full_layers:
        screen.note(
            f"{economy.full_layers} of {counted(layers, 'layer')} {'is' if economy.full_layers == 1 else 'are'} "
            "computed again in the backward: keeping their parts would not fit in memory"
        )
    if economy.streamed:
        screen.note("base streamed from disk, 2 layers in memory at a time")


def _check_vocabulary(setup: Setup) -> None:
    """A token that the model has no row for would end the run in the middle of a step."""
    size = setup.new.after if setup.new else text_shape(setup.model_config)["vocab"]
    sets = [found for found in (setup.prepared.train, setup.prepared.held_out) if found]
    highest = max(found.highest() for found in sets)
    if highest >= size:
        raise ModelError(
            f"--model: its tokenizer gives token {highest} ({setup.tokenizer.decode([highest])!r}), and the model's "
            f"vocabulary ends at {size - 1}",
            ("likely", "tokens were added to the tokenizer, and the embedding table was not made larger"),
            ("way out", "a --template without them, or the tokenizer that belongs to these weights"),
        )


def _count(parameters: int) -> str:
    """``596.0 M``; thousands below a million, for the small models of a test or a lesson."""
    return f"{parameters / 1e6:,.1f} M" if parameters >= 1e6 else f"{parameters / 1e3:,.1f} K"


def default_micro_tokens(setup: Setup) -> int:
    """Tokens per micro-batch when nobody says: what was recorded, else as ``micro_tokens_for``."""
    return setup.facts.get("micro_tokens") or micro_tokens_for(setup.prepared, setup.config.micro_tokens)


def micro_tokens_for(prepared: Prepared, asked: int | None) -> int:
    """What was asked for, else 768 or the longest row."""
    return asked or max(768, prepared.train.longest())


def fill(plan: StepPlan) -> float:
    """Real tokens over computed tokens, padding counted, over one pass: 1.0 when packed."""
    if plan.packing:
        return 1.0
    real = computed = 0
    for step in range(min(plan.steps, -(-len(plan.data) // plan.batch_size))):
        lengths = plan.data.lengths_of(plan.examples(step))
        for members in group(lengths, plan.micro_tokens, packing=False):
            real += sum(lengths[i] for i in members)
            computed += len(members) * max(lengths[i] for i in members)
    return real / max(1, computed)


def explain_non_finite(error: NonFiniteStepError, setup: Setup) -> NonFiniteError:
    """Name the step and the rows, and write these out so that they can be looked at."""
    origins = [setup.prepared.train.origins[i] for i in error.examples]
    path = setup.folder.path / "data" / "nonfinite.jsonl"
    texts = [setup.tokenizer.decode(setup.prepared.train.example(i)[0].tolist()) for i in error.examples]
    rows = [
        json.dumps({"file": o.file, "row": o.row, "text": t}, ensure_ascii=False)
        for o, t in zip(origins, texts, strict=True)
    ]
    if rows:
        write_text(path, "\n".join(rows) + "\n")
    named = "\n".join(map(str, origins[:8])) + (f"\n… and {len(origins) - 8} more" if len(origins) > 8 else "")
    return NonFiniteError(
        f"step {error.step}: {error.message}" if error.step else f"before training: {error.message}",
        ("rows", named),
        ("written", f"{path}" if rows else ""),
        ("kept", "every checkpoint that was complete before is still there"),
        ("way out", "a lower --lr, a longer --warmup, --clip 1, or mend the rows; then start again in another --out"),
    )


def describe_method(config: AdapterConfig, sites: int | None = None) -> str:
    """The settings that matter most, in a few words."""
    words = {"rank": "r {}", "alpha": "alpha {:g}"}
    said = [word.format(getattr(config, name)) for name, word in words.items() if hasattr(config, name)]
    if number := getattr(config, "virtual_tokens", 0):
        said.append(counted(number, "virtual token"))
    facts = ", ".join(said)
    if isinstance(config, Lisa):
        return (
            f"{counted(config.lisa_layers, 'layer')} at a time beside embeddings and head, drawn every "
            f"{counted(config.lisa_every, 'step')}"
        )
    if hasattr(config, "virtual_tokens"):
        return facts  # on how many layers they are kept says nothing
    if METHODS[config.kind].result == "model":
        return "weights of the base"
    return " ".join(filter(None, (facts, f"on {counted(sites, 'layer')}" if sites else "")))


def stored_as(setup: Setup) -> QuantRecipe | None:
    """How the base's linear layers are packed: by the checkpoint, or by ``--quant``."""
    return load.packing(setup.config.model, setup.model_config, setup.config.recipe())


def _say_data(setup: Setup, screen: Screen) -> None:
    report = setup.prepared.report
    rejected = sum(report["rejected"].values())
    why = ", ".join(f"{n} {reason}" for reason, n in report["rejected"].items())
    files = ", ".join(setup.config.data)
    listed = "" if setup.config.dry_run else f" → {setup.folder.path}/data/rejects.jsonl"
    screen.say(
        "data",
        f"{files}  {counted(report['read'], 'row')} · {report['used']:,} used"
        + (f" · {rejected} left out: {why}{listed}" if rejected else ""),
    )
    held = report["held_out"]
    share = report["trained_tokens"] / max(1, report["tokens"])
    screen.note(
        f"{counted(report['tokens'], 'token')} · {share:.0%} trained · longest {report['max_length_seen']:,}"
        + (f" · {counted(held['rows'], 'row')} held out" if held else "")
        + (" (tokens from the cache)" if setup.prepared.cached else "")
    )
    if template := setup.prepared.template:
        screen.note(f"template: {template.name} ({template.digest[:8]}) · {stops_said(report['truncated'])}")


def stops_said(truncated: dict[str, int]) -> str:
    """Whether every answer ends in a stop token, in words; ``truncated`` as ``data.length.truncation`` counts it."""
    words, broken = "every answer ends in a stop token, trained", truncated["without_stop"]
    return words + (f", but for {broken:,} that were cut short" if broken else "")


def _say_model(setup: Setup, screen: Screen, *, base: int, trained: int, sites: int, packed: str) -> None:
    config = setup.config
    storage, products = setup.precision.storage, setup.precision.autocast
    screen.say(
        "model",
        f"{config.model}  {_count(base)}, {name_of(storage)} ({setup.precision.reason})"
        + (f", products in {name_of(products)}" if products not in (None, storage) else ""),
    )
    if recipe := stored_as(setup):
        screen.note(f"its {packed} in {recipe}; the head, embeddings and norms as they are")
    how = describe_method(config.method_settings(), sites)
    screen.say("method", f"{config.method}  {how} · {_count(trained)} trained ({trained / base:.1%})")


def _micro_tokens(plan: StepPlan) -> int:
    """Tokens of the largest micro-batch; a row is never cut."""
    return min(max(plan.micro_tokens, plan.data.longest()), _step_tokens(plan))


def _step_tokens(plan: StepPlan) -> int:
    """Tokens of the largest of the first steps: a micro-batch can't hold more than its step."""
    return max(sum(plan.data.lengths_of(plan.examples(step))) for step in range(min(plan.steps, 20)))


def _seconds(setup: Setup, plan: StepPlan, parameters: int, share: float) -> float:
    tokens = plan.total * len(setup.prepared.train.tokens) / len(setup.prepared.train)
    flops = flops_per_token(setup.model_config, parameters, trained_share=share, trains_base=setup.config.trains_model)
    rate = gemm_rate(setup.precision.autocast or setup.precision.storage, setup.device) * 1e9 * _STEP_EFFICIENCY
    # Attention runs example by example, and a step costs some time to hand out however little it computes.
    segments = plan.total * text_shape(setup.model_config)["layers"] * _SECONDS_PER_SEGMENT
    return tokens * flops / rate + segments + plan.steps * 0.05


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
