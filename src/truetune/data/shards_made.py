"""One block of rows made into one shard: a file with the tokens, and with all that is asked about the rows later.

Shards are written whole or not at all and carry a checksum, so that a run which was killed finds those it had finished.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from truetune.data.duplicates import said
from truetune.data.formats import Choice
from truetune.data.language import holds_code, letters
from truetune.data.near import Sketches
from truetune.data.policy import drops
from truetune.data.read_blocks import Block
from truetune.data.rejects import Rejects
from truetune.data.schema import Origin, Reject, Row
from truetune.data.split import content_key, held_out
from truetune.data.token_files import load_whole, save_whole
from truetune.data.token_set import TokenSet

Parse = Callable[..., tuple[list[Row], list[Reject]]]  # as ``formats.parse_rows`` with its settings filled in
Encode = Callable[[Sequence[Row]], tuple[TokenSet, list[Reject]]]


@dataclass(frozen=True)
class Task:
    """What one shard is made of.

    Attributes:
        number: of the shard.
        block: its rows.
        first: the first block of that file that has rows, which settles the file's format.
        sketched: whether its rows take part in the search for near repeats.
    """

    number: int
    block: Block
    first: Block
    sketched: bool


@dataclass(frozen=True)
class Counts:
    """A shard in numbers: what whoever waits for it has to know.

    ``faulty`` rows could not be read or understood; ``refused`` ones can't be tokenised. ``left_out`` are rows left out
    by choice, by reason and detail. ``letters`` and ``code_rows`` (see ``data.language``) are those of the rows that
    are trained on; ``dropped`` are rows by the policy that took something off them.
    """

    read: int
    rows: int
    faulty: int
    left_out: dict[str, dict[str, int]]
    refused: int
    templated: bool
    sketched: bool
    letters: dict[str, int]
    code_rows: int
    dropped: dict[str, int]


@dataclass(frozen=True)
class Shard:
    """What one block became.

    Attributes:
        examples: the rows that can be trained on.
        keys: [rows] int64, ``content_key`` of every row that was understood.
        numbers: [rows] int64, the rows' numbers in the file.
        places: [examples] int64, which of those rows each example is.
        sketches: [rows or 0, 128] uint16, see ``data.near``.
        rejects: rows that could not be read, not be understood, and not be tokenised; none that is left out by choice.
        refused: which of the understood rows those last ones are.
        counts: all of it in numbers.
    """

    examples: TokenSet
    keys: Tensor
    numbers: Tensor
    places: Tensor
    sketches: Tensor
    rejects: tuple[list[Reject], list[Reject], list[Reject]]
    refused: list[int]
    counts: Counts


@dataclass(frozen=True)
class ShardMaker:
    """Makes the shards of a folder.

    Attributes:
        parse, encode: from raw rows to rows, and on to tokens.
        form: the format, or ``auto``.
        share: of the rows that are held out.
        choices: the formats of the files that were met, by this process.
    """

    folder: Path
    parse: Parse
    encode: Encode
    form: str
    share: float
    choices: dict[str, Choice]

    def __call__(self, task: Task, *, only_check: bool = False) -> Counts:
        """Make a shard, unless it is there already.

        Args:
            only_check: read and parse, and make no tokens: the run is refused anyway, and only counts.
        """
        path = shard_file(self.folder, task.number)
        if not only_check and (found := load_shard(path)):
            return found.counts
        shard = self._made(task, only_check=only_check)
        save_shard(path, shard)
        return shard.counts

    def _made(self, task: Task, *, only_check: bool) -> Shard:
        raw, unreadable = task.block.read()
        if raw and task.block.file not in self.choices:
            self.parse(task.first.read()[0], self.form, choices=self.choices)
        rows, misfits = self.parse(raw, self.form, choices=self.choices) if raw else ([], [])
        left_out: dict[str, dict[str, int]] = {}
        understood = Rejects(misfits)
        for (_, reason, detail), count in understood.left_out.items():
            left_out.setdefault(reason, {})[detail] = count
        examples, refused = self.encode([] if only_check else rows)
        place = {row.origin.row: number for number, row in enumerate(rows)}
        keys = _numbers(content_key(row) for row in rows)
        texts = [said(row) for row in rows]
        learned = [text for text, held in zip(texts, held_out(keys, self.share).tolist(), strict=True) if not held]
        sketches = Sketches()
        if task.sketched:
            sketches.add(texts)
        return Shard(
            examples=examples,
            keys=keys,
            numbers=_numbers(row.origin.row for row in rows),
            places=_numbers(place[origin.row] for origin in examples.origins),
            sketches=torch.from_numpy(sketches.matrix),
            rejects=(unreadable, list(understood), refused),
            refused=[place[reject.origin.row] for reject in refused],
            counts=Counts(
                read=len(raw) + len(unreadable),
                rows=len(rows),
                faulty=len(unreadable) + len(understood),
                left_out=left_out,
                refused=len(refused),
                templated=any(row.messages for row in rows),
                sketched=task.sketched,
                letters=dict(letters(learned)),
                code_rows=sum(map(holds_code, learned)),
                dropped=dict(drops(rows)),
            ),
        )


def shard_file(folder: Path, number: int) -> Path:
    """Where shard ``number`` is kept."""
    return folder / f"{number:06d}.safetensors"


def save_shard(path: Path, shard: Shard) -> None:
    """Write a shard whole.

    Raises:
        OSError: the disk is full.
    """
    tensors = {name: getattr(shard, name) for name in ("keys", "numbers", "places")}
    tensors |= {name: getattr(shard.examples, name) for name in ("tokens", "trained", "offsets")}
    rejects = [[[r.origin.file, r.origin.row, r.reason, r.detail, r.raw] for r in part] for part in shard.rejects]
    file = next((origin.file for origin in shard.examples.origins), "")
    rest = [file, rejects, shard.refused, list(astuple(shard.counts))]
    save_whole(path, {**tensors, "sketches": shard.sketches.view(torch.int16)}, rest)


def load_shard(path: Path) -> Shard | None:
    """A whole shard; None where there is none, or it is damaged."""
    found = load_whole(path)
    return _unpacked(*found) if found else None


def _unpacked(tensors: dict[str, Tensor], rest: Any) -> Shard:
    file, rejects, refused, counts = rest
    origins = [Origin(file, number) for number in tensors["numbers"][tensors["places"]].tolist()]
    unreadable, misfits, untokenised = ([Reject(Origin(f, n), *words) for f, n, *words in part] for part in rejects)
    return Shard(
        examples=TokenSet(tensors["tokens"], tensors["trained"], tensors["offsets"], origins),
        keys=tensors["keys"],
        numbers=tensors["numbers"],
        places=tensors["places"],
        sketches=tensors["sketches"].view(torch.uint16),
        rejects=(unreadable, misfits, untokenised),
        refused=refused,
        counts=Counts(*counts),
    )


def _numbers(values: Iterator[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int64)
