"""GGUF files as artefacts: read back into the model they say they are, and asked what llama.cpp would be asked.

A file is one model, or a LoRA, which is put on the base that the run had; a folder is what ``export --to ollama``
writes: a Modelfile with the words and the ends of answers, and the files that it names.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from truetune.data.template import Template
from truetune.errors import ModelError, TemplateError, TruetuneError, nearest
from truetune.eval.limits import coarser
from truetune.export import gguf_read, modelfile
from truetune.export.gguf_arch import Arch, arch_of
from truetune.export.gguf_read import HEAD, TABLE, GGUFFile
from truetune.export.gguf_vocabulary import Vocabulary, differences
from truetune.models import load, plain
from truetune.models.precision import name_of
from truetune.models.tokenizer import ChatTokenizer
from truetune.recipes.export_source import Source, trained_template
from truetune.recipes.gguf_words import modelfile_of, reader_of, words_of
from truetune.recipes.verify_reference import Reference, Sample
from truetune.recipes.verify_subjects import Loaded, Opening, tokenizer_of_run
from truetune.recipes.verify_target import Target


def is_gguf(path: Path) -> bool:
    """A GGUF file, or a folder that an export left them in."""
    names = (modelfile.FILE, modelfile.MODEL, modelfile.ADAPTER)
    return path.suffix == ".gguf" if path.is_file() else any((path / name).is_file() for name in names)


def files_in(path: Path) -> tuple[Path, Path | None]:
    """``(model or LoRA, LoRA on that model)`` of a file, or of a folder: those that its Modelfile names, if it has one.

    Raises:
        ModelError: the Modelfile names what is not there.
    """
    if path.is_file():
        return path, None
    if said := modelfile_in(path):
        return _named(path, "FROM", said.model), _named(path, "ADAPTER", said.adapter) if said.adapter else None
    model, adapter = path / modelfile.MODEL, path / modelfile.ADAPTER
    if not model.is_file():
        return adapter, None
    return model, adapter if adapter.is_file() else None


def modelfile_in(folder: Path) -> modelfile.Modelfile | None:
    """What a folder's Modelfile says; None where it has none, and for a file."""
    path = folder / modelfile.FILE
    if not path.is_file():
        return None
    try:
        return modelfile.Modelfile.of(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise ModelError(f"{path} is not UTF-8 text") from None


def _named(folder: Path, what: str, name: str) -> Path:
    path = folder / name
    if path.is_dir() or (name and "/" not in name and not name.endswith(".gguf")):
        raise TruetuneError(f"{folder / modelfile.FILE} says {what} {name}: only GGUF files are read here")
    if not name or not path.is_file():
        raise ModelError(
            f"{folder / modelfile.FILE} says {what} {name or 'nothing'}, and that is no file here",
            ("did you mean", nearest(Path(name).name, [file.name for file in folder.glob("*.gguf")])),
        )
    return path


@dataclass
class LoadedGGUF(Loaded):
    """A model whose weights, wording and stop tokens are those of a GGUF."""

    vocabulary: Vocabulary = field(default_factory=lambda: Vocabulary({}))
    stop_texts: Sequence[str] = ()  # that end an answer as well, whatever tokens they are

    def prompt(self, sample: Sample) -> tuple[str | None, list[int] | int] | None:
        """As llama.cpp's server words it."""
        return prompt_by(self.vocabulary, self.tokenizer, sample) if self.words else None

    def lost_stops(self, reference: Reference) -> list[str]:
        """By the keys, and by the texts that llama.cpp knows."""
        if not self.words:
            return []
        lost = [number for number in reference.stop_ids if number not in self.vocabulary.stop_ids]
        return [text for text in map(self.tokenizer.decode, ([n] for n in lost)) if text not in self.stop_texts]


def prompt_by(
    vocabulary: Vocabulary, tokenizer: ChatTokenizer, sample: Sample
) -> tuple[str | None, list[int] | int] | None:
    """``(text, ids)`` of a prompt, worded by a file's own template and opening; None where the sample has no words."""
    text = sample.text
    if sample.messages:
        if vocabulary.template is None:
            return "the file has no chat template", []
        try:
            text = tokenizer.render(
                list(sample.messages), vocabulary.template, tools=list(sample.tools) or None, prompt=True
            )
        except TruetuneError as error:
            return error.message[:200], []
    if not text:
        return None
    framed = vocabulary.framed(text)
    return framed, reader_of(vocabulary, tokenizer)(framed)


def open_gguf(opening: Opening) -> Loaded:
    """Read a file, or a folder's files, into the trained model's architecture.

    Raises:
        ModelError, AdapterError: it is not whole, or of another model.
        TruetuneError: it can't be told whether it is the same: its architecture or its numbers are not known here.
    """
    path, beside = files_in(opening.path)
    file, update = gguf_read.read_file(path), gguf_read.read_file(beside) if beside else None
    return _lora_on_base(opening, file) if file.is_adapter else _model(opening, file, update)


def _model(opening: Opening, file: GGUFFile, update: GGUFFile | None) -> LoadedGGUF:
    target = opening.target
    config, arch = _architecture(target, opening.revision)
    _check_arch(file, arch)
    config = _as_in(file, config)
    state = dict(gguf_read.weights(file, arch, config, _shapes(config)))
    if update is not None:
        _check_arch(update, arch)
        _add(update, arch, config, state)
    vocabulary, tokenizer = Vocabulary(file.keys), tokenizer_of_run(target, opening.revision)
    source = Source(target.base, target.file)
    template = trained_template(source, tokenizer)
    expected = Vocabulary(words_of(tokenizer, template, source.card, config.vocab_size))
    faults = gguf_read.other_hyperparameters(file, arch, config, config.vocab_size) + differences(vocabulary, expected)
    kind = coarser(file.kind, update.kind) if update else file.kind
    model, kind = _computing(opening, plain.of_weights(config, state, device=opening.device), kind)
    loaded = LoadedGGUF(
        str(opening.path), "truetune", kind, model, tokenizer, vocabulary.stop_ids, faults=faults, vocabulary=vocabulary
    )
    if said := modelfile_in(opening.path):
        _as_ollama_words(loaded, said, source, template, expected)
    return loaded


def _as_ollama_words(
    loaded: LoadedGGUF, said: modelfile.Modelfile, source: Source, template: Template | None, expected: Vocabulary
) -> None:
    """Ollama words prompts by the Modelfile, and puts the opening token of the GGUF in front."""
    loaded.stop_texts = said.stops
    if (found := loaded.vocabulary.opening) != expected.opening:
        one, other = (repr(token) if token else "nothing" for token in (found, expected.opening))
        loaded.faults.append(f"Ollama would put {one} in front of every prompt, and training put {other}")
    system = source.card.get("system")
    try:
        trained, _ = modelfile_of(loaded.tokenizer, template, source.card, system=system, adapter=bool(said.adapter))
    except TemplateError as error:
        loaded.notes.append(f"its Modelfile words prompts, and can't be compared: {error.message}")
        return
    loaded.faults += said.differences(trained)
    if unsaid := [repr(text) for text in trained.stops if text not in said.stops]:
        loaded.notes.append(f"the Modelfile does not stop at {', '.join(unsaid)}: it is left to the keys of the GGUF")


def _lora_on_base(opening: Opening, file: GGUFFile) -> LoadedGGUF:
    """A LoRA alone words no prompts: those are the base's, whose file is another."""
    target = opening.target
    config, arch = _architecture(target, opening.revision)
    _check_arch(file, arch)
    load.check_dense(target.base, load.load_config(target.base, revision=opening.revision))
    model = load.load_model(target.base, dtype=torch.float32, device=opening.device, revision=opening.revision)
    _add(file, arch, config, dict(model.named_parameters()))
    kind = coarser(file.kind, name_of(load.checkpoint_dtype(config)))
    model, kind = _computing(opening, model, kind)
    tokenizer = tokenizer_of_run(target, opening.revision)
    note = f"added to {target.base}, as llama.cpp does; whether that base says the same as a GGUF is not seen by it"
    return LoadedGGUF(
        str(opening.path), "truetune", kind, model, tokenizer, tokenizer.stop_ids | _stops(target), words=False,
        notes=[note],
    )  # fmt: skip


def _stops(target: Target) -> frozenset[int]:
    return frozenset(Source(target.base, target.file).card.get("stop_ids", ()))


def _architecture(target: Target, revision: str | None) -> tuple[Any, Arch]:
    """The trained model's config, as of dense weights, and what llama.cpp has for it.

    Raises:
        TruetuneError: nothing; so a file can't be read back.
    """
    config = load.dense_config(load.load_config(target.base, revision=revision))
    try:
        return config, arch_of(config)
    except ModelError as error:
        raise TruetuneError(error.message, ("way out", "--against llama.cpp, where that is installed")) from None


def _check_arch(file: GGUFFile, arch: Arch) -> None:
    found = file.keys.get("general.architecture")
    if found != arch.name:
        raise ModelError(f"{file.path} is of the architecture {found}, and the trained model's is {arch.name}")


def _as_in(file: GGUFFile, config: Any) -> Any:
    """The config with as many tokens as the file has, and a head of its own where the file has one."""
    config = copy.deepcopy(config)
    if TABLE in file.tensors:
        config.vocab_size = gguf_read.shape_of(file.tensors[TABLE])[0]
    config.tie_word_embeddings = HEAD not in file.tensors
    return config


def _shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Of the model's tensors; a tied head is the table, and stands there once."""
    skeleton = load.skeleton(config, dtype=torch.float32)
    return {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()}


def _add(update: GGUFFile, arch: Arch, config: Any, state: Mapping[str, Tensor]) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    with torch.no_grad():
        for name, change in gguf_read.updates(update, arch, config, shapes):
            state[name] += change.to(state[name].device)


def _computing(opening: Opening, model: Any, kind: str) -> tuple[Any, str]:
    """The model in the precision that was asked for, float32 for ``auto``, and the coarser of that and its file."""
    if opening.dtype == "auto":
        return model, kind
    dtype = getattr(torch, opening.dtype)
    return model.to(dtype), coarser(kind, name_of(dtype))
