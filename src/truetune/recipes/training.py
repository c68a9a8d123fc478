"""What ``sft`` and ``pretrain`` share: everything but the form of the data."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from truetune.adapters.methods import trained_parts
from truetune.adapters.virtual import virtual_ids
from truetune.checkpoint import run_state
from truetune.checkpoint.run_state import Progress
from truetune.config.resolve import Resolved
from truetune.config.sft import TrainConfig
from truetune.data.plan import StepPlan
from truetune.data.rejects import write_rejects
from truetune.errors import counted
from truetune.eval.perplexity import Evaluation
from truetune.models import forward, load
from truetune.models.layers import decoder_layers
from truetune.models.precision import choose_device, choose_precision
from truetune.models.survey import survey
from truetune.models.tokenizer import ChatTokenizer
from truetune.ops import buffers, dispatch
from truetune.ops.allocator import keep_freed_memory, trim
from truetune.optim import choose
from truetune.optim.schedule import Schedule, warmup_steps
from truetune.recipes import continued, memory_plan, new_tokens, plan_report, result, resume
from truetune.recipes.data import Prepared
from truetune.recipes.held_out import HeldOut
from truetune.recipes.method_hooks import method_hooks
from truetune.recipes.run_folder import locked, open_run, start, write_json
from truetune.recipes.setup import Setup
from truetune.train.log import RunLog, Screen
from truetune.train.loop import Run, train
from truetune.train.neftune import NoisyLoss
from truetune.train.step import Loss, NonFiniteStepError

Prepare = Callable[..., Prepared]


def run_training(resolved: Resolved[Any], prepare: Prepare, *, screen: Screen | None = None) -> dict[str, Any]:
    """Check, plan, load, train, write the result.

    Returns:
        What ``--json`` prints.
    """
    screen = screen or Screen()
    began = time.perf_counter()
    keep_freed_memory()
    resolved, begun = continued.read_start(resolved)
    setup = _set_up(resolved, prepare, screen, begun)
    outline = plan_report.outline(setup, screen)
    if setup.config.dry_run:
        return outline
    if done := result.finished(setup, steps=outline["steps"]):
        screen.say("done", f"the run in {setup.folder.path} is complete: nothing is left to do")
        return done
    trim()
    model = load.load_model(
        setup.config.model,
        dtype=setup.precision.storage,
        device=setup.device,
        revision=setup.config.revision,
        config=setup.model_config,
        quant=setup.config.recipe(),
        warn=screen.warn,
    )
    continued.put_on(setup, model)
    with locked(setup.folder), memory_plan.streamed(setup, model, is_streamed=outline["streamed"]):
        start(setup.folder, resolved)
        write_rejects(setup.folder.path / "data" / "rejects.jsonl", setup.prepared.rejects)
        plan, way = _plan(setup, model, outline, screen)
        with forward.prepared(way, recompute=outline["recompute"], full_layers=outline["full_layers"]):
            progress, evaluation = _train(setup, way, plan, screen)
        buffers.release()  # or the libraries that draw the losses would come on top of a step's activations
        trim()
        return result.finish(setup, model, progress, evaluation, screen=screen, seconds=time.perf_counter() - began)


def _set_up(resolved: Resolved[Any], prepare: Prepare, screen: Screen, begun: continued.Begun | None) -> Setup:
    config: TrainConfig = resolved.config
    device = choose_device(config.device)
    memory_plan.check_device(config, device)
    folder = open_run(resolved, screen)
    model_config = load.load_config(config.model, revision=config.revision)
    stored = load.check_readable(config.model, model_config)
    if stored and config.trains_model:
        load.check_dense(config.model, model_config)
    tokenizer = ChatTokenizer.load(config.model, revision=config.revision)
    if begun:
        begun.check(model_config, screen)
        tokenizer, admitted = begun.admitted(tokenizer, screen)
    if begun is None or begun.stays:
        admitted = new_tokens.admit(config, tokenizer, model_config, screen)
    virtual = getattr(config.method_settings(), "virtual_tokens", 0)
    max_length = load.usable_length(model_config, config.max_length, virtual=virtual)
    facts = resume.facts_of(folder.checkpoint)
    context = load.context_length(model_config)
    prepared = prepare(config, tokenizer, max_length=max_length, screen=screen, date=facts.get("date"),
                       card=begun.file.card if begun else None, most=context and context - virtual)  # fmt: skip
    if begun:
        begun.say_template(prepared, screen)
    new_tokens.warn_of_unseen(admitted.new, prepared, screen)
    precision = choose_precision(
        facts.get("compute", config.dtype),
        load.checkpoint_dtype(model_config),
        device=device,
        trains="base" if config.trains_model else "parts" if _trains_parts(config, begun) else "adapter",
        because="as this run was started" if "compute" in facts else "as asked",
    )
    now = {
        "data": prepared.digest,
        "held_out": prepared.held_out_digest,
        "date": prepared.date,
        "base": _base_identity(config.model, model_config),
        "tokens": admitted.new and admitted.new.card(),
        **({"on" if begun.stays else "start": begun.identity} if begun else {}),
        "compute": str(precision.autocast or precision.storage).removeprefix("torch."),
        "environment": resume.environment(),
    }
    resume.check_facts(facts, now, screen)
    if folder.checkpoint is None:
        resume.tell_repeat(resolved, now, screen)
    return Setup(config, folder, tokenizer, model_config, prepared, precision, device, facts | now,
                 admitted.new, admitted.rows, start=begun.file if begun and not begun.stays else None,
                 on=begun.file if begun and begun.stays else None)  # fmt: skip


def _trains_parts(config: TrainConfig, begun: continued.Begun | None) -> bool:
    return bool(trained_parts(config.method_settings())) or (begun is not None and begun.holds_parts)


def _base_identity(model: str, model_config: Any) -> str | None:
    """What a resumed run must find again: a fingerprint of the files, or the commit of a model of the Hub."""
    if load.is_local(model):
        return load.fingerprint(load.model_folder(model))
    return getattr(model_config, "_commit_hash", None)


def _plan(setup: Setup, model: Any, outline: dict[str, Any], screen: Screen) -> tuple[StepPlan, forward.Path]:
    config, facts = setup.config, setup.facts
    resumed = "packing" in facts
    packing = facts.get("packing", config.packing)
    examples = setup.prepared.train.behind(virtual_ids(model))
    sets = [found for found in (examples, setup.prepared.held_out) if found]
    with setup.precision.context(setup.device):
        found = survey(model, longest=max(found.longest() for found in sets))
    if packing is None or (packing and not resumed):
        if packing and not found.packs:
            screen.warn("--packing: this model does not keep packed rows apart; rows are padded instead")
        elif not found.packs:
            screen.note("rows are padded: this model does not keep packed rows apart")
        packing = found.packs
    fused = len(found.fusable) if packing else 0
    screen.note(f"kernels: {dispatch.describe()} · {fused} of {counted(len(decoder_layers(model)), 'layer')} fused")
    micro = facts.get("micro_tokens") or config.micro_tokens or plan_report.default_micro_tokens(setup)
    setup.facts.update(packing=packing, micro_tokens=micro, max_memory=config.max_memory)
    setup.facts.update({name: outline[name] for name in ("recompute", "full_layers", "streamed")})
    plan = StepPlan.build(
        examples, batch_size=config.batch_size, micro_tokens=micro, packing=packing, seed=config.seed,
        epochs=config.epochs, max_steps=config.max_steps,
    )  # fmt: skip
    return plan, forward.Path(model, found, packing)


def _train(setup: Setup, way: forward.Path, plan: StepPlan, screen: Screen) -> tuple[Progress, Evaluation | None]:
    config, model = setup.config, way.model
    report = setup.prepared.report | {"packing_fill": plan_report.fill(plan)}
    write_json(setup.folder.path / "data" / "report.json", report)
    parameters = run_state.trained_state(model)
    optimizer = choose.optimizer(
        config.optim, parameters, lr=config.peak_lr, weight_decay=config.weight_decay, steps=plan.steps,
        lora_plus_ratio=config.lora_plus_ratio,
    )  # fmt: skip
    hooks = method_hooks(model, setup.adapter, optimizer, seed=config.seed, steps=plan.steps)
    progress = _begun(setup, model, optimizer, screen, steps=plan.steps)
    held_out = HeldOut(setup, way, plan) if setup.prepared.held_out else None
    log = RunLog(setup.folder.log, screen, steps=plan.steps, start=progress.step, every=config.log_every)
    run = Run(
        plan=plan,
        schedule=Schedule(config.peak_lr, plan.steps, warmup_steps(config.warmup, plan.steps), config.schedule),
        loss_of=_training_loss(config, way),
        parameters=list(parameters.values()),
        optimizer=optimizer,
        autocast=functools.partial(setup.precision.context, setup.device),
        clip=config.clip,
        seed=config.seed,
        save_every=config.save_every,
        eval_every=config.eval_every,
        evaluate=held_out,
        out_of_memory=lambda tokens: _say_smaller(setup, tokens, screen),
        save=lambda p: _save(setup, model, optimizer, p),
        log=log,
        hooks=hooks,
    )
    model.train()
    try:
        with log:
            progress = train(run, progress)
    except NonFiniteStepError as error:
        raise plan_report.explain_non_finite(error, setup) from None
    changed = _select(setup, model, progress)
    return progress, held_out.of_the_result(again=changed) if held_out else None


def _begun(setup: Setup, model: Any, optimizer: torch.optim.Optimizer, screen: Screen, *, steps: int) -> Progress:
    """Where the run stands: at its start, or as its checkpoint says, which then fills the model and the optimizer."""
    if setup.folder.checkpoint is None:
        return Progress(facts=setup.facts)
    restored = resume.restore(setup.folder.path, setup.folder.checkpoint, model, optimizer, screen)
    screen.say("resume", f"from {setup.folder.checkpoint}, step {restored.step} of {steps}")
    return replace(restored, facts=setup.facts)


def _select(setup: Setup, model: Any, progress: Progress) -> bool:
    """Put the best state in the place of the last, if that was asked for; whether the model has changed by that."""
    best = progress.best_step
    if setup.config.select != "best" or best is None or best == progress.step:
        return False
    run_state.restore(run_state.folder_of(setup.folder.path, best), model)
    return True


def _training_loss(config: TrainConfig, way: forward.Path) -> Loss:
    """The loss as it is trained; evaluations go by ``way.scores``, which neither noise nor smoothing reaches."""
    loss = functools.partial(way.loss, smoothing=config.label_smoothing)
    alpha = config.neftune_alpha
    return NoisyLoss(loss, way.model.get_input_embeddings(), alpha) if alpha else loss


def _say_smaller(setup: Setup, tokens: int, screen: Screen) -> None:
    """Recorded as well, so that a resumed run cuts its steps the same way."""
    setup.facts["micro_tokens"] = tokens
    screen.warn(f"out of memory: going on with at most {counted(tokens, 'token')} at a time, which changes no result")


def _save(setup: Setup, model: Any, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
    base = setup.config.model
    run_state.save(setup.folder.path, model, optimizer, progress, base=base, keep=setup.config.keep)
