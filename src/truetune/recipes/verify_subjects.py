"""What is held against the trained model: folders, libraries that load them, servers; each asked the same questions.

A new kind of artefact is one entry beside ``MODELS``: how it is told by its path, and how it is opened.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from truetune.adapters.files import CONFIG
from truetune.config.quant import QuantRecipe
from truetune.errors import ModelError, counted, nearest
from truetune.eval.limits import coarser
from truetune.generate.answer import answer_all
from truetune.models import load, plain
from truetune.models.precision import choose_precision, name_of
from truetune.models.tokenizer import ChatTokenizer
from truetune.recipes.new_tokens import tokenizer_of
from truetune.recipes.verify_reference import Reference, Sample, logits_of
from truetune.recipes.verify_target import Target
from truetune.train.log import Screen


@dataclass(frozen=True)
class Answer:
    """A greedy answer: its ids where the subject gives ids, its text, and whether a stop token ended it."""

    text: str
    stopped: bool
    ids: tuple[int, ...] | None = None


class Subject(Protocol):
    """What can be asked of an artefact; each answer may be None for "that can't be asked of it".

    ``kind`` is a key of ``eval.limits.LIMITS``: how coarsely it computes or is stored.
    """

    @property
    def name(self) -> str:
        """As it was named."""

    @property
    def loader(self) -> str:
        """Who runs it."""

    @property
    def kind(self) -> str:
        """How coarsely."""

    @property
    def notes(self) -> Sequence[str]:
        """What else there is to say about it."""

    @property
    def faults(self) -> Sequence[str]:
        """What it says of itself that is not so of the trained model; each is drift."""

    def prompt(self, sample: Sample) -> tuple[str | None, list[int] | int] | None:
        """``(text, ids)`` of a prompt as the artefact words it by itself; or the number of ids, where it tells only
        that."""

    def logits(self, sample: Sample) -> Tensor | None:
        """[n, vocab] float32 at the sample's positions."""

    def answers(self, samples: Sequence[Sample], longest: int) -> list[Answer] | None:
        """Greedy answers to the trained prompts, one each."""

    def lost_stops(self, reference: Reference) -> list[str]:
        """Trained stop tokens that would not end an answer."""


@dataclass
class Loaded:
    """A model in this process, whoever loaded it.

    Attributes:
        stops: that end an answer; None for those of the model's own generation settings.
        words: whether it brings tokenizer and template of its own; else prompts are not its affair.
        together: whether prompts may be asked in one batch, with padding in front of the shorter ones.
    """

    name: str
    loader: str
    kind: str
    model: Any
    tokenizer: ChatTokenizer
    stops: frozenset[int] | None = None
    words: bool = True
    together: bool = True
    autocast: Callable[[], Any] | None = None
    notes: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def prompt(self, sample: Sample) -> tuple[str | None, list[int] | int] | None:
        """As a user of transformers asks for it; of bare text, its ids."""
        if not self.words:
            return None
        if not sample.messages:
            return (sample.text, self.tokenizer.encode([sample.text])[0]) if sample.text else None
        options: dict[str, Any] = {"tools": list(sample.tools) or None, "add_generation_prompt": True}
        try:
            text = self.tokenizer.hf.apply_chat_template(list(sample.messages), tokenize=False, **options)
            ids = self.tokenizer.hf.apply_chat_template(list(sample.messages), return_dict=False, **options)
        except Exception as error:  # a template is a program, and may be missing altogether
            return (" ".join(str(error).split())[:200], [])
        return str(text), list(ids)

    def logits(self, sample: Sample) -> Tensor:
        """Through the model's own forward."""
        with self.autocast() if self.autocast else contextlib.nullcontext():
            return logits_of(self.model, sample)

    def answers(self, samples: Sequence[Sample], longest: int) -> list[Answer]:
        """Ended by its own stop tokens, as its users would see it."""
        stops = plain.own_stops(self.model) if self.stops is None else self.stops
        prompts = [sample.prompt for sample in samples]
        batches = [prompts] if self.together else [[prompt] for prompt in prompts]
        made = [ids for batch in batches for ids in answer_all(self.model, batch, stop_ids=stops, longest=longest)]
        decode = self.tokenizer.hf.decode
        return [
            Answer(decode(ids, skip_special_tokens=True), bool(ids) and ids[-1] in stops, tuple(ids)) for ids in made
        ]

    def lost_stops(self, reference: Reference) -> list[str]:
        """By the model's generation settings."""
        own = plain.own_stops(self.model) if self.stops is None else self.stops
        return [self.tokenizer.decode([stop]) for stop in reference.stop_ids if stop not in own]


@dataclass(frozen=True)
class Opening:
    """Where, and how finely, an artefact is to be computed, and what it is held against.

    Attributes:
        dtype: what was asked for, or ``auto``.
        compute: what the trained model is computed in.
    """

    path: Path
    dtype: str
    device: str
    target: Target
    compute: str
    revision: str | None = None


@dataclass(frozen=True)
class Folder:
    """An artefact that was named, and how it is to be opened."""

    path: Path
    open: Callable[[Opening], Loaded]
    loader: str

    @property
    def name(self) -> str:
        """As the table calls it."""
        return str(self.path)


Detect = Callable[[Path], bool]


def is_model(path: Path) -> bool:
    """A folder of transformers: dense or packed."""
    return (path / "config.json").is_file() and not (path / CONFIG).is_file()


def open_model(opening: Opening) -> Loaded:
    """A model's folder, by our loader: every tensor in its place, or an error."""
    path = str(opening.path)
    config = load.load_config(path)
    recipe = load.check_readable(path, config)
    precision = choose_precision(
        opening.dtype if opening.dtype != "auto" else _stored(config), load.checkpoint_dtype(config),
        device=opening.device,
    )  # fmt: skip
    notes: list[str] = []
    model = load.load_model(path, dtype=precision.storage, device=opening.device, config=config, warn=notes.append)
    tokenizer = ChatTokenizer.load(path)
    faults = _other_tokens(tokenizer, tokenizer_of_run(opening.target, opening.revision))
    kind = _kind(recipe, config, precision.storage)
    return Loaded(path, "truetune", kind, model, tokenizer, notes=notes, faults=faults)


def open_by_transformers(opening: Opening) -> Loaded:
    """A model's folder, by ``from_pretrained`` and nothing else."""
    path = str(opening.path)
    config = load.load_config(path)
    recipe = load.check_readable(path, config)
    model, faults = plain.load_plain(opening.path, device=opening.device)
    if faults:
        more = f" and {len(faults) - 4} more" if len(faults) > 4 else ""
        raise ModelError(f"transformers loads {path} with {len(faults)} faults: {', '.join(faults[:4])}{more}")
    if opening.dtype != "auto" and not recipe:
        model = model.to(getattr(torch, opening.dtype))
    return Loaded(path, "transformers", _kind(recipe, config, model.dtype), model, ChatTokenizer.load(path))


def tokenizer_of_run(target: Target, revision: str | None) -> ChatTokenizer:
    """The one that trained, with the tokens that the adapter brings."""
    tokenizer = ChatTokenizer.load(target.base, revision=revision)
    return tokenizer_of(target.file, tokenizer, Screen(silent=True)) if target.file else tokenizer


def _other_tokens(found: ChatTokenizer, trained: ChatTokenizer) -> list[str]:
    """In what a tokenizer cuts texts otherwise than the one that trained; the prompts may hold none of these."""
    ids, known = found.hf.get_vocab(), trained.hf.get_vocab()
    if other := sorted((number, token) for token, number in known.items() if ids.get(token) != number):
        number, token = other[0]
        now = ids.get(token, "none")
        return [
            f"{counted(len(other), 'token has', 'tokens have')} other ids, such as {token!r}: {now}, and was {number}"
        ]
    return [] if found.rules == trained.rules else ["its tokenizer joins pieces of text by other rules"]


Kinds = Mapping[str, tuple[Detect, Callable[[Opening], Loaded]]]
MODELS: Kinds = {"model": (is_model, open_model)}
"""Kind of artefact → (is it one, how to open it), in the order they are tried."""


def find(name: str, kinds: Kinds = MODELS) -> Folder:
    """The artefact that a path means.

    Raises:
        ModelError: nothing is there, or nothing that can be verified.
    """
    path = Path(name).expanduser()
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        close = nearest(path.name, siblings)
        raise ModelError(f"there is no artefact {name}", ("did you mean", str(path.parent / close) if close else ""))
    for detect, opener in kinds.values():
        if detect(path):
            return Folder(path, opener, "truetune")
    raise ModelError(
        f"{name} is nothing that can be verified",
        ("expected", "a merged or quantised model's folder, with its weights and its tokenizer; a GGUF; an adapter"),
    )


def prompt_agrees(subject: Subject, sample: Sample) -> bool | None:
    """Whether the artefact words a prompt to the very ids that were trained; None where it words none."""
    found = subject.prompt(sample)
    if found is None:
        return None
    _, ids = found
    whole = sample.prompt if sample.messages else list(sample.tokens)
    return ids == (len(whole) if isinstance(ids, int) else whole)


def _kind(recipe: QuantRecipe | None, config: Any, computes: torch.dtype) -> str:
    """The coarser of how weights are stored and how products are computed."""
    if recipe:
        return recipe.kind
    return coarser(name_of(load.checkpoint_dtype(config)), name_of(computes))


def _stored(config: Any) -> str:
    """The checkpoint's own dtype, by torch's name; float16 as float32 on any machine, which holds all of its values."""
    dtype = load.checkpoint_dtype(config)
    return "float32" if dtype == torch.float16 else str(dtype).removeprefix("torch.")
