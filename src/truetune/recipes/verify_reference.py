"""What a run keeps to be checked by: a few of the very prompts it trained on, and what the trained model said to them.

``data/reference.json`` in the run's folder, and not in the adapter's: it holds rows of the data, and an adapter is
given away. Its size is bounded: so many prompts, so many positions of each, the likeliest tokens at each position.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from truetune.adapters.virtual import virtual_ids
from truetune.checkpoint.atomic import write_text
from truetune.config.sft import TrainConfig
from truetune.data.pack import Batch, collate
from truetune.data.read import read_rows
from truetune.data.schema import Message, Origin, Row
from truetune.data.standard_input import path_of
from truetune.data.template import as_dict
from truetune.data.token_set import TokenSet
from truetune.errors import CheckpointError, TruetuneError
from truetune.eval.agreement import top_log_probabilities
from truetune.models.forward import trained_logits
from truetune.recipes.quality import spread
from truetune.recipes.setup import Setup
from truetune.recipes.tokenise import intake

FILE = Path("data") / "reference.json"
_FORMAT = 1
_LONGEST = 1024  # tokens of an example; where every example is longer, the shortest are taken
_POSITIONS = 32  # of one example, spread over its trained tokens, the first and the last among them
_LIKELIEST = 8
_LOOKED_AT = 1 << 14  # examples that samples are chosen from
_READ_AGAIN = 256 << 20  # bytes of a data file that is read a second time for the wording of a row


@dataclass(frozen=True)
class Sample:
    """One prompt of the run.

    Attributes:
        part: which rows it is from.
        row: file and number of the row.
        tokens: the whole example as it was trained.
        positions: places in ``tokens`` of the trained tokens that are compared, ascending.
        prompt_tokens: how many of ``tokens`` come before the last answer.
        messages: the turns before that answer, as the row has them; empty for bare text, or where the row is not at
            hand any more.
        tools: what the row offers.
        text: the prompt as rendered; of bare text, the whole of it.
        top_ids, top_logprobs: at each position, the likeliest tokens by the trained model, and ln of their
            probabilities.
    """

    part: Literal["train", "held_out"]
    row: str
    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    prompt_tokens: int
    messages: tuple[Mapping[str, Any], ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    text: str = ""
    top_ids: tuple[tuple[int, ...], ...] = ()
    top_logprobs: tuple[tuple[float, ...], ...] = ()

    @property
    def prompt(self) -> list[int]:
        """The ids that an answer follows."""
        return list(self.tokens[: self.prompt_tokens])

    @property
    def targets(self) -> Tensor:
        """[n] int64: the tokens at the compared positions."""
        return torch.tensor([self.tokens[position] for position in self.positions])

    def batch(self, model: Any) -> Batch:
        """The example alone, behind the model's virtual tokens, asking for the logits of the compared positions."""
        flags = [False] * len(self.tokens)
        for position in self.positions:
            flags[position] = True
        alone = TokenSet.from_lists([self.tokens], [flags], [Origin(self.row, 0)])
        return collate(alone.behind(virtual_ids(model)), [0], packing=False)


@dataclass(frozen=True)
class Reference:
    """The file: how the run worded and computed, and its samples."""

    compute: str  # dtype of the matrix products
    stop_ids: tuple[int, ...]  # that were trained
    system: str | None
    templated: bool
    samples: tuple[Sample, ...]


@torch.no_grad()
def logits_of(model: Any, sample: Sample) -> Tensor:
    """[n, vocab] float32 on the CPU: what a model makes of the sample's compared positions."""
    return trained_logits(model, sample.batch(model)).float().cpu()


def record(setup: Setup, model: Any, *, autocast: Callable[[], AbstractContextManager[object]]) -> Path | None:
    """Write the reference of a run whose training has just ended; None where it keeps none.

    Args:
        model: as trained; left in ``eval`` mode.
    """
    model.eval()
    count = setup.config.verify_prompts
    prepared = setup.prepared
    chosen = _samples(prepared.train, "train", count)
    chosen += _samples(prepared.held_out, "held_out", count) if prepared.held_out else []
    if not chosen:
        return None
    rows = _rows_of(chosen, setup.config) if prepared.template else {}
    samples = []
    for sample in chosen:
        worded = _worded(setup, sample, rows.get(sample.row))
        with autocast():
            ids, values = top_log_probabilities(logits_of(model, worded), _LIKELIEST)
        rounded = tuple(tuple(round(value, 6) for value in row) for row in values.tolist())
        samples.append(replace(worded, top_ids=tuple(map(tuple, ids.tolist())), top_logprobs=rounded))
    stops = sorted(prepared.train.ends() & setup.tokenizer.stop_ids)
    reference = Reference(
        str(setup.facts["compute"]), tuple(stops), prepared.system, prepared.template is not None, tuple(samples)
    )
    path = setup.folder.path / FILE
    write_text(path, json.dumps({"format": _FORMAT, **asdict(reference)}, ensure_ascii=False) + "\n")
    return path


def read(path: Path) -> Reference:
    """Read a reference.

    Raises:
        CheckpointError: it is not there, damaged, or of another version.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.pop("format") != _FORMAT:
            raise CheckpointError(f"{path} was written by another version of truetune, in a form that is not known")
        samples = tuple(_sample(item) for item in found.pop("samples"))
        return Reference(**{**found, "stop_ids": tuple(found["stop_ids"]), "samples": samples})
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is no reference of a run: {error}", ("likely", "a copy cut short")) from None


def read_all(paths: Sequence[Path], *, recorded: bool) -> Reference:
    """The prompts of one run or of several; without what their models said, if that is not ``recorded`` of this one.

    Raises:
        CheckpointError: as ``read``.
    """
    found = [read(path) for path in paths]
    if recorded:
        return found[0]
    samples = tuple(replace(sample, top_ids=(), top_logprobs=()) for one in found for sample in one.samples)
    computed = {one.compute for one in found}
    compute = computed.pop() if len(computed) == 1 else "float32"
    stops = tuple(sorted({stop for one in found for stop in one.stop_ids}))
    return replace(found[0], samples=samples, compute=compute, stop_ids=stops)


def _sample(item: Mapping[str, Any]) -> Sample:
    def frozen(value: Any) -> Any:
        return tuple(map(frozen, value)) if isinstance(value, list) else value

    return Sample(**{name: frozen(value) for name, value in item.items()})


def _samples(examples: TokenSet, part: Literal["train", "held_out"], count: int) -> list[Sample]:
    """``count`` examples from all over a set; of a large one, some thousand are looked at."""
    seen = spread(range(len(examples)), _LOOKED_AT)
    lengths = dict(zip(seen, examples.lengths_of(seen), strict=True))
    usable = [i for i in seen if lengths[i] > 1 and bool(examples.example(i)[1][1:].any())]
    short = [i for i in usable if lengths[i] <= _LONGEST]
    picked = spread(short, count) if short else sorted(usable, key=lambda i: lengths[i])[:count]
    return [_bare(examples, i, part) for i in picked]


def _bare(examples: TokenSet, index: int, part: Literal["train", "held_out"]) -> Sample:
    tokens, trained = (tensor.tolist() for tensor in examples.example(index))
    places = [i for i in range(1, len(tokens)) if trained[i]]
    if len(places) > _POSITIONS:
        places = [places[round(i * (len(places) - 1) / (_POSITIONS - 1))] for i in range(_POSITIONS)]
    last = max((i for i in range(1, len(tokens)) if trained[i] and not trained[i - 1]), default=0)
    return Sample(part, str(examples.origins[index]), tuple(tokens), tuple(places), last or max(1, len(tokens) // 2))


def _rows_of(samples: Sequence[Sample], config: TrainConfig) -> dict[str, Row]:
    """The rows that samples are from, read again: tokens may come from a cache, which keeps no wording."""
    files = list(dict.fromkeys(sample.row.rpartition(", row ")[0] for sample in samples))
    wanted = {sample.row for sample in samples}
    found: dict[str, Row] = {}
    for file in files:
        try:
            if os.path.getsize(path_of(file)) > _READ_AGAIN:
                continue
            rows, _ = intake(config)(read_rows([file])[0], getattr(config, "format", "text"))
        except (OSError, TruetuneError):  # gone, or changed, since it was tokenised
            continue
        found |= {str(row.origin): row for row in rows if str(row.origin) in wanted}
    return found


def _worded(setup: Setup, sample: Sample, row: Row | None) -> Sample:
    """The sample with its prompt as turns and as text, where these give the very tokens that were trained."""
    tokenizer, template, system = setup.tokenizer, setup.prepared.template, setup.prepared.system
    if template is None or row is None or not row.messages:
        text = tokenizer.decode(sample.tokens)
        return replace(sample, text=text if tokenizer.encode([text])[0] == list(sample.tokens) else "")
    last = max((i for i, message in enumerate(row.messages) if message.role == "assistant"), default=0)
    turns = row.messages[:last]
    head = (Message("system", system),) if system is not None and turns and turns[0].role != "system" else ()
    for as_text in (False, True) if turns else ():
        try:
            text = template.render(
                tokenizer, (*head, *turns), tools=row.tools, calls_as_text=as_text, prompt=True
            )  # fmt: skip
        except TruetuneError:
            continue
        ids = tokenizer.encode([text])[0]
        if list(sample.tokens[: len(ids)]) == ids and len(ids) < len(sample.tokens):
            messages = tuple(as_dict(turn, calls_as_text=as_text) for turn in turns)
            return replace(sample, prompt_tokens=len(ids), messages=messages, tools=tuple(row.tools), text=text)
    return sample  # the row was cut, or is another one by now
