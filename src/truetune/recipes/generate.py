"""``truetune generate``: one prompt, one answer, from a base, an adapter on it, or a merged model."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from truetune.adapters import files
from truetune.adapters.virtual import virtual_ids
from truetune.config.generate import GenerateConfig
from truetune.config.resolve import Resolved
from truetune.data.schema import Message
from truetune.data.template import Template, resolve_template
from truetune.errors import ConfigError, ModelError
from truetune.generate.answer import Sampling, answer
from truetune.models import load
from truetune.models.precision import choose_device, choose_precision
from truetune.models.tokenizer import ChatTokenizer
from truetune.recipes.adapter import check_base, packing_remark
from truetune.train.log import Screen


@dataclass(frozen=True)
class Speaker:
    """A model that can be asked: weights, tokenizer, template and the tokens that end an answer."""

    model: Any
    tokenizer: ChatTokenizer
    template: Template | None
    stop_ids: frozenset[int]
    system: str | None = None  # the message that training put in front where there was none

    def prompt_ids(self, prompt: str, system: str | None = None) -> list[int]:
        """The ids of a prompt, worded exactly as in training, with ``system`` in place of its system message."""
        if self.template is None:
            text = self.tokenizer.bos_token + prompt
        else:
            system = self.system if system is None else system
            head = (Message("system", system),) if system is not None else ()
            turn = Message("user", prompt, instruction=prompt, input="")
            text = self.template.render(self.tokenizer, (*head, turn), prompt=True)
        return self.tokenizer.encode([text])[0]


def run(resolved: Resolved[GenerateConfig]) -> dict[str, Any]:
    """Answer as the config says; the text goes to stdout as it comes."""
    config, screen = resolved.config, Screen()
    speaker = load_speaker(config, screen)
    prompt = sys.stdin.read() if config.prompt == "-" else config.prompt
    ids = speaker.prompt_ids(prompt, config.system)
    _check_prompt(ids, speaker)
    longest, limit = _longest_answer(config.max_new_tokens, ids, speaker)
    sampling = Sampling(longest, config.temperature, config.top_p, config.seed)
    began = time.perf_counter()

    def show(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    new = answer(speaker.model, speaker.tokenizer, ids, stop_ids=speaker.stop_ids, sampling=sampling, show=show)
    seconds = time.perf_counter() - began
    show("\n")
    stopped = bool(new) and new[-1] in speaker.stop_ids
    why = "stopped by itself" if stopped else f"cut at {limit}"
    screen.say("done", f"{len(new)} tokens, {why} · {len(new) / seconds:,.1f} tok/s")
    text = speaker.tokenizer.hf.decode(new, skip_special_tokens=True)
    return {"text": text, "prompt_tokens": len(ids), "new_tokens": len(new), "stopped": stopped,
            "tok_s": round(len(new) / seconds, 2)}  # fmt: skip


def _check_prompt(ids: Sequence[int], speaker: Speaker) -> None:
    """What the model could not take in would end in the middle of its arithmetic."""
    context, vocabulary = _context(speaker), len(speaker.model.get_input_embeddings().weight)
    if not ids:
        raise ConfigError("--prompt is empty, and this model starts a text with no token of its own")
    if context and len(ids) >= context:
        raise ConfigError(f"--prompt: {len(ids):,} tokens, and the model was made for at most {context:,}")
    if (highest := max(ids)) >= vocabulary:
        text = speaker.tokenizer.decode([highest])
        raise ModelError(
            f"--model: its tokenizer gives token {highest} ({text!r}), and its vocabulary ends at {vocabulary - 1}",
            ("way out", "the tokenizer that belongs to these weights, or another --template"),
        )


def _longest_answer(asked: int, ids: Sequence[int], speaker: Speaker) -> tuple[int, str]:
    """``(tokens, what sets this limit)``: behind its context a model has no positions, or none that it knows."""
    context = _context(speaker)
    if context and len(ids) + asked > context:
        return context - len(ids), f"the model's context of {context:,} tokens"
    return asked, f"--max-new-tokens {asked}"


def _context(speaker: Speaker) -> int | None:
    """The tokens that the model has positions for, without those that its adapter takes."""
    whole = load.context_length(speaker.model.config)
    return whole and whole - len(virtual_ids(speaker.model))


def load_speaker(config: GenerateConfig, screen: Screen) -> Speaker:
    """Load what the config names, adapter and template included.

    Raises:
        ModelError, AdapterError, TemplateError: what does not fit, and the way out.
    """
    device = choose_device(config.device)
    model_config = load.load_config(config.model, revision=config.revision)
    tokenizer = ChatTokenizer.load(config.model, revision=config.revision)
    file = files.read(Path(config.adapter).expanduser()) if config.adapter else None
    if file is not None:
        base = load.local_copy(config.model, revision=config.revision)
        check_base(file, config.model, base, allow_other=config.allow_other_base)
        if remark := packing_remark(file, load.packing(config.model, model_config, config.recipe())):
            screen.note(remark)
    card = file.card if file else {}
    template = _template(config.template, card, tokenizer, screen)
    precision = choose_precision(config.dtype, load.checkpoint_dtype(model_config), device=device)
    model = load.load_model(
        config.model, dtype=precision.storage, device=device, revision=config.revision, config=model_config,
        quant=config.recipe(), warn=screen.warn,
    )  # fmt: skip
    if file is not None:
        files.load(model, file)
        model.eval()
    stop_ids = tokenizer.stop_ids | frozenset(card.get("stop_ids", ()))
    return Speaker(model, tokenizer, template, stop_ids, card.get("system"))


def _template(setting: str, card: Any, tokenizer: ChatTokenizer, screen: Screen) -> Template | None:
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
