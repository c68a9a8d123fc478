"""``truetune generate``: answers from a base, an adapter on it, or a merged model."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from truetune.adapters import files
from truetune.adapters.bank import Bank
from truetune.adapters.virtual import virtual_ids
from truetune.config.generate import AnswerGroup, GenerateConfig
from truetune.config.resolve import Resolved
from truetune.data.schema import Message
from truetune.data.template import Template, resolve_template
from truetune.errors import ConfigError, ModelError, TemplateError
from truetune.generate.engine import Engine
from truetune.generate.grammar import Grammar
from truetune.generate.request import Delta, Handle, Request, Sampling
from truetune.models import load
from truetune.models.precision import choose_device, choose_precision
from truetune.models.tokenizer import ChatTokenizer
from truetune.recipes import generate_input
from truetune.recipes import generate_rows as batch
from truetune.recipes.adapter import check_base, check_template, check_tokenizer, packing_remark
from truetune.recipes.generate_form import form_of
from truetune.recipes.new_tokens import tokenizer_of
from truetune.train.log import Screen


@dataclass(frozen=True)
class Speaker:
    """A model that can be asked: weights, tokenizer, template and the tokens that end an answer."""

    model: Any
    tokenizer: ChatTokenizer
    template: Template | None
    stop_ids: frozenset[int]
    system: str | None = None  # the message that training put in front where there was none
    adapter: Path | None = None  # the folder of one that the model does not carry itself

    def prompt_ids(self, prompt: str, system: str | None = None) -> list[int]:
        """The ids of a prompt, worded exactly as in training, with ``system`` in place of its system message."""
        return self.conversation_ids([Message("user", prompt, instruction=prompt, input="")], system)

    def conversation_ids(
        self, turns: Sequence[Message], system: str | None = None, *, tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[int]:
        """The same of a conversation; without a template its texts follow each other."""
        if self.template is None:
            text = self.tokenizer.bos_token + "".join(turn.content for turn in turns)
        else:
            system = self.system if system is None else system
            head = (Message("system", system),) if system is not None and turns[0].role != "system" else ()
            text = self._rendered(self.template, (*head, *turns), tools)
        return self.tokenizer.encode([text])[0]

    def _rendered(self, template: Template, turns: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> str:
        """As training words it: arguments of calls as text for a template that takes them no other way."""
        if tools and "tools" not in template.source:
            raise TemplateError("the template has no place for tools")
        try:
            return template.render(self.tokenizer, turns, tools=tools, prompt=True)
        except TemplateError:
            if not any(turn.tool_calls for turn in turns):
                raise
            return template.render(self.tokenizer, turns, tools=tools, calls_as_text=True, prompt=True)


def run(resolved: Resolved[GenerateConfig]) -> dict[str, Any]:
    """Answer as the config says; the text goes to stdout as it comes."""
    config, screen, form = resolved.config, Screen(), form_of(resolved.config)
    if config.input is not None and config.output is not None:
        setup = generate_input.setup_of(config, form)
        jobs = generate_input.read(Path(config.input).expanduser(), Path(config.output).expanduser(), setup=setup)
        speaker = load_speaker(config, screen, attached=False)
        return batch.run(config, jobs, speaker, screen, form=form)
    speaker = load_speaker(config, screen, attached=False)
    asked = [sys.stdin.read() if prompt == "-" else prompt for prompt in config.prompt]
    prompts = [speaker.prompt_ids(prompt, config.system) for prompt in asked]
    for ids in prompts:
        check_prompt(ids, speaker)
    engine = engine_of(config, speaker, longest=max(map(len, prompts)))
    grammar = None if form is None else engine.grammars.read(form)
    began = time.perf_counter()
    handles = [engine.submit(request_for(config, speaker, ids, grammar=grammar)) for ids in prompts]
    engine.start()
    answers = []
    try:
        for number, (handle, ids) in enumerate(zip(handles, prompts, strict=True)):
            if len(prompts) > 1:
                screen.say("prompt", f"{number + 1} of {len(prompts)}")
            answers.append(_shown(handle, ids, began))
            _say_end(screen, answers[-1], config, speaker)
    finally:
        engine.stop(drain=False)
    return answers[0] if len(answers) == 1 else {"answers": answers}


def _shown(handle: Handle, ids: Sequence[int], began: float) -> dict[str, Any]:
    """One answer, written to stdout as it comes."""
    text, new, end = "", 0, Delta()
    for end in handle:
        text, new = text + end.text, new + len(end.ids)
        sys.stdout.write(end.text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
    if end.finish == "error":
        raise ModelError(f"no answer: {end.error}")
    seconds = max(time.perf_counter() - began, 1e-9)
    return {"text": text, "prompt_tokens": len(ids), "new_tokens": new, "stopped": end.finish == "stop",
            "tok_s": round(new / seconds, 2)}  # fmt: skip


def _say_end(screen: Screen, answer: dict[str, Any], config: GenerateConfig, speaker: Speaker) -> None:
    limit = f"--max-new-tokens {config.max_new_tokens}"
    if answer["new_tokens"] < config.max_new_tokens:
        limit = f"the model's context of {load.context_length(speaker.model.config):,} tokens"
    why = "stopped by itself" if answer["stopped"] else f"cut at {limit}"
    screen.say("done", f"{answer['new_tokens']} tokens, {why} · {answer['tok_s']:,.1f} tok/s")


ADAPTER = "adapter"
"""The name of the adapter that ``--adapter`` gives."""


def engine_of(config: AnswerGroup, speaker: Speaker, *, rows: int = 8, longest: int | None = None) -> Engine:
    """An engine for a speaker, its adapter beside the base.

    Args:
        longest: tokens of the longest prompt, where that is known.
    """
    context = load.context_length(speaker.model.config) or 1 << 62
    each = context if longest is None else min(context, longest + config.max_new_tokens + _SPARE)
    engine = Engine(speaker.model, speaker.tokenizer, max_rows=rows, max_tokens=rows * min(each, _MOST_TOKENS))
    if speaker.adapter is not None:
        engine.adapters.register(ADAPTER, speaker.adapter)
    return engine


_SPARE, _MOST_TOKENS = 256, 32_768


def request_for(
    config: AnswerGroup, speaker: Speaker, ids: Sequence[int], *, grammar: Grammar | None = None
) -> Request:
    """A prompt with the settings of a command."""
    sampling = Sampling(
        temperature=config.temperature, top_p=config.top_p, top_k=config.top_k, min_p=config.min_p,
        repetition_penalty=config.repetition_penalty, presence_penalty=config.presence_penalty,
        frequency_penalty=config.frequency_penalty, seed=config.seed,
    )  # fmt: skip
    name = ADAPTER if speaker.adapter is not None else None
    return Request(ids, name, sampling, config.max_new_tokens, config.stop, speaker.stop_ids, grammar=grammar)


def check_prompt(ids: Sequence[int], speaker: Speaker, flag: str = "--prompt") -> None:
    """What the model could not take in would end in the middle of its arithmetic.

    Raises:
        ConfigError, ModelError: an empty prompt, a long one, or ids that the model lacks.
    """
    whole, vocabulary = load.context_length(speaker.model.config), len(speaker.model.get_input_embeddings().weight)
    if not ids:
        raise ConfigError(f"{flag} is empty, and this model starts a text with no token of its own")
    if whole and len(ids) >= whole - len(virtual_ids(speaker.model)):
        raise ConfigError(f"{flag}: {len(ids):,} tokens, and the model was made for at most {whole:,}")
    if (highest := max(ids)) >= vocabulary:
        text = speaker.tokenizer.decode([highest])
        raise ModelError(
            f"--model: its tokenizer gives token {highest} ({text!r}), and its vocabulary ends at {vocabulary - 1}",
            ("way out", "the tokenizer that belongs to these weights, or another --template"),
        )


def load_speaker(config: AnswerGroup, screen: Screen, *, attached: bool = True) -> Speaker:
    """Load what the config names, adapter and template included.

    Args:
        attached: put the adapter on the model; else it stays in its folder for an engine, unless it changes the base.
    Raises:
        ModelError, AdapterError, TemplateError: what does not fit, and the way out.
    """
    device = choose_device(config.device)
    model_config = load.load_config(config.model, revision=config.revision)
    tokenizer = ChatTokenizer.load(config.model, revision=config.revision)
    parents = {path: files.read(Path(path).expanduser()) for path in config.weights}
    file = next(iter(parents.values()), None)
    for file in reversed(parents.values()):
        base = load.local_copy(config.model, revision=config.revision)
        check_base(file, config.model, base, allowed=config.allowed)
        check_tokenizer(file, tokenizer, allowed=config.allowed)
        if remark := packing_remark(file, load.packing(config.model, model_config, config.recipe())):
            screen.note(remark)
        tokenizer = tokenizer_of(file, tokenizer, screen)
    card = file.card if file else {}
    template = template_of(config.template, card, tokenizer, screen)
    for parent in parents.values():
        check_template(parent, template, allowed=config.allowed)
    precision = choose_precision(config.dtype, load.checkpoint_dtype(model_config), device=device)
    model = load.load_model(
        config.model, dtype=precision.storage, device=device, revision=config.revision, config=model_config,
        quant=config.recipe(), warn=screen.warn,
    )  # fmt: skip
    alone = list(config.weights.values()) == [1.0]
    attached = attached or not alone or any(p.settings.trainable or p.settings.token_rows for p in parents.values())
    if file is not None and attached and alone:
        files.load(model, file)
        model.eval()
    elif parents and attached:
        _add_up(model, parents, list(config.weights.values()))
        screen.note(f"adapters {' + '.join(config.adapter)}, added up")
    stop_ids = tokenizer.stop_ids.union(*(parent.card.get("stop_ids", ()) for parent in parents.values()))
    folder = file.folder if file is not None and not attached else None
    return Speaker(model, tokenizer, template, stop_ids, card.get("system"), folder)


def _add_up(model: Any, parents: Mapping[str, files.AdapterFile], weights: Sequence[float]) -> None:
    """Compute with the sum of several adapters, each times its weight."""
    bank = Bank(model)
    for name, file in parents.items():
        bank.add(name, file)
    bank.use(list(parents), weights)


def template_of(setting: str, card: Any, tokenizer: ChatTokenizer, screen: Screen) -> Template | None:
    """The template that ``--template`` means beside an adapter's card; None for bare text."""
    if setting == "none":
        return None
    if setting == "auto":
        if trained := card.get("template"):
            return Template(trained["name"], trained["source"])
        if "template" in card:
            screen.note("the adapter was trained on bare text, without a chat template: the prompt is continued as it "
                        "is; --template NAME words it as a conversation")  # fmt: skip
            return None
        if tokenizer.own_template is None:
            screen.note("no chat template is known: the prompt is continued as bare text")
            return None
    return resolve_template(setting, tokenizer)
