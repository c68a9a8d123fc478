"""A GGUF in llama.cpp itself, through ``llama-cpp-python``: its tokens, its logits, its answers."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from truetune.errors import ConfigError, ModelError
from truetune.eval.limits import coarser
from truetune.export import gguf_read
from truetune.export.gguf_vocabulary import Vocabulary
from truetune.export.modelfile import ADAPTER, MODEL
from truetune.models.tokenizer import ChatTokenizer
from truetune.recipes.verify_gguf import files_in, prompt_by
from truetune.recipes.verify_reference import Reference, Sample
from truetune.recipes.verify_subjects import Answer

_F32 = 0  # ``GGML_TYPE_F32``


def check_installed() -> None:
    """Raises ConfigError where llama.cpp's Python binding is not there."""
    if importlib.util.find_spec("llama_cpp") is None:
        raise ConfigError(
            "--against llama.cpp: its Python binding is not installed here", ("way out", "pip install llama-cpp-python")
        )


class LlamaCpp:
    """A ``Subject`` that llama.cpp computes, keys and values in float32.

    Args:
        path: a model's file, or a folder with ``model.gguf`` and perhaps ``adapter.gguf``.
        tokenizer: the run's, to decode with.
        context: the longest text, in tokens.
    Raises:
        ModelError: llama.cpp does not load it.
        ConfigError: a LoRA alone; llama.cpp puts one on a model that is a GGUF too.
    """

    loader = "llama.cpp"
    faults = ()

    def __init__(self, path: Path, tokenizer: ChatTokenizer, *, context: int) -> None:
        file, lora = files_in(path)
        read = gguf_read.read_file(file)
        if read.is_adapter:
            raise ConfigError(
                f"{path} is a LoRA alone, and llama.cpp puts one on a model that is a GGUF too",
                ("way out", f"a folder with {MODEL} and {ADAPTER} in it, as export --to ollama --as-adapter writes it"),
            )
        self.name, self.notes = str(path), ["llama.cpp computed it, keys and values in float32"]
        self.kind = coarser(read.kind, gguf_read.read_file(lora).kind) if lora else read.kind
        if str(read.keys.get("general.architecture")).startswith(("gemma", "gpt2")):
            self.kind = coarser(self.kind, "gguf-f16")
            self.notes.append("it looks GELU up in a table of float16")
        self._vocabulary, self._tokenizer = Vocabulary(read.keys), tokenizer
        self._module = importlib.import_module("llama_cpp")  # for this comparison alone: nothing depends on it
        self._model = self._loaded(file, lora, context)
        self._stops = {n for n in range(self._model.n_vocab()) if self._module.llama_vocab_is_eog(self._words, n)}

    def prompt(self, sample: Sample) -> tuple[str | None, list[int] | int] | None:
        """Worded by the file's template, and cut into tokens by llama.cpp."""
        found = prompt_by(self._vocabulary, self._tokenizer, sample)
        if found is None or not found[0] or found[1] == []:
            return found
        bare = found[0].removeprefix(self._vocabulary.opening)
        return found[0], self._model.tokenize(bare.encode(), add_bos=True, special=True)

    def logits(self, sample: Sample) -> Tensor:
        """[n, vocab] float32."""
        self._model.reset()
        self._model.eval(list(sample.tokens))
        rows = [position - 1 for position in sample.positions]
        return torch.from_numpy(self._model.scores[rows].copy())

    def answers(self, samples: Sequence[Sample], longest: int) -> list[Answer]:
        """By its own sampler, at temperature 0."""
        return [self._answer(sample.prompt, longest) for sample in samples]

    def lost_stops(self, reference: Reference) -> list[str]:
        """What it does not end an answer at."""
        return [self._tokenizer.decode([stop]) for stop in reference.stop_ids if stop not in self._stops]

    def _answer(self, prompt: list[int], longest: int) -> Answer:
        self._model.reset()
        ids: list[int] = []
        for token in itertools.islice(self._model.generate(prompt, temp=0.0), longest):
            ids.append(int(token))
            if token in self._stops:
                break
        text = self._tokenizer.hf.decode(ids, skip_special_tokens=True)
        return Answer(text, bool(ids) and ids[-1] in self._stops, tuple(ids))

    @property
    def _words(self) -> Any:
        return self._module.llama_model_get_vocab(self._model.model)

    def _loaded(self, file: Path, lora: Path | None, context: int) -> Any:
        threads = torch.get_num_threads()
        try:
            return self._module.Llama(
                str(file), n_ctx=context, n_batch=context, n_threads=threads, n_threads_batch=threads, logits_all=True,
                type_k=_F32, type_v=_F32, lora_path=str(lora) if lora else None, verbose=False,
            )  # fmt: skip
        except (ValueError, RuntimeError, AssertionError) as error:
            raise ModelError(
                f"llama.cpp does not load {file}", ("because", " ".join(str(error).split())[:300])
            ) from None
