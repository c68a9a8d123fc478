"""Other libraries that ``--against`` names: whether each is here, and what it makes of an artefact or the adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from truetune.adapters.vocabulary import NewTokens
from truetune.config.methods import METHODS
from truetune.config.verify import VerifyConfig
from truetune.errors import ConfigError, ModelError
from truetune.export.onto import recipe_of
from truetune.models import load, plain
from truetune.models.precision import name_of
from truetune.models.tokenizer import ChatTokenizer
from truetune.recipes import verify_llama_cpp
from truetune.recipes.verify_gguf import is_gguf
from truetune.recipes.verify_reference import Sample
from truetune.recipes.verify_subjects import (
    Folder,
    Loaded,
    Opening,
    Subject,
    is_model,
    open_by_transformers,
    tokenizer_of_run,
)
from truetune.recipes.verify_target import Target

Opener = Callable[[], Subject]


def check(config: VerifyConfig, target: Target, artefacts: Sequence[Folder]) -> None:
    """Refuse what can't be asked before any model is loaded.

    Raises:
        ConfigError: a library that is not installed, or has nothing to load among the artefacts.
    """
    if "peft" in config.peers:
        plain.check_peft()
    if "llama.cpp" in config.peers:
        verify_llama_cpp.check_installed()
        if not any(is_gguf(artefact.path) for artefact in artefacts):
            raise ConfigError(
                "--against llama.cpp: there is no GGUF among the artefacts",
                ("way out", f"truetune export --adapter {config.run} --to gguf --out model.gguf, and name model.gguf"),
            )
    whole = target.file is None  # the run's result is a model itself
    if "transformers" in config.peers and not whole and not any(is_model(artefact.path) for artefact in artefacts):
        raise ConfigError(
            "--against transformers: there is no model's folder among the artefacts",
            ("way out", f"truetune merge --adapter {config.run} --out merged, and name merged"),
        )


def of_artefact(
    config: VerifyConfig, artefact: Folder, opening: Opening, samples: Sequence[Sample]
) -> Iterator[tuple[str, Opener]]:
    """``(loader, how to open it)`` of the libraries that load an artefact."""
    if "transformers" in config.peers and is_model(artefact.path):
        yield "transformers", lambda: open_by_transformers(opening)
    if "llama.cpp" in config.peers and is_gguf(artefact.path):
        context = max(len(sample.tokens) for sample in samples) + config.max_new_tokens

        def by_llama_cpp() -> Subject:
            tokenizer = tokenizer_of_run(opening.target, opening.revision)
            return verify_llama_cpp.LlamaCpp(artefact.path, tokenizer, context=context)

        yield "llama.cpp", by_llama_cpp


def by_peft(target: Target, config: VerifyConfig, compute: str, device: str) -> Loaded:
    """The adapter on its base, loaded by PEFT.

    Raises:
        ModelError: the run left a whole model, trained on a packed base, or by a method that PEFT does not have.
    """
    if target.file is None:
        raise ModelError("--against peft: this run left a whole model, and PEFT loads adapters")
    if recipe_of(target.file.card):
        raise ModelError("--against peft: the base was packed while it was trained, which is not compared this way")
    kind = target.file.settings.kind
    if METHODS[kind].peft is None:
        raise ModelError(f"--against peft: PEFT has no such method as --method {kind}")
    base = load.local_copy(target.base, revision=config.revision)
    dtype, new = getattr(torch, compute), NewTokens.of_card(target.file.card)
    tokens = new.after if new else None
    model = plain.load_by_peft(base, target.result, dtype=dtype, device=device, tokens=tokens)
    tokenizer = ChatTokenizer.load(target.base, revision=config.revision)
    stops = tokenizer.stop_ids | frozenset(target.file.card.get("stop_ids", ()))
    # PEFT puts virtual tokens in front of the padding, and what stands behind it answers otherwise.
    together = not hasattr(target.file.settings, "virtual_tokens")
    return Loaded(
        str(target.result), "peft", name_of(dtype), model, tokenizer, stops=stops, words=False, together=together
    )
