"""``recipes.tokenise`` for data that is larger than memory: block by block, on all cores, into files.

What it says, refuses, counts and gives is the same; only the order in which it finds out is another one.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from truetune.config.sft import TrainConfig
from truetune.data import rejects as rejected
from truetune.data import shards_pool
from truetune.data.near import LIMIT
from truetune.data.read_blocks import Block, blocks_of, no_rows
from truetune.data.rejects import Rejects
from truetune.data.row_keys import Side
from truetune.data.schema import Reject, Row
from truetune.data.shards import SetWriter
from truetune.data.shards_made import Counts, ShardMaker, Task
from truetune.data.shards_read import Shards, likeness_of
from truetune.data.sources import find_files
from truetune.data.split import held_out
from truetune.data.standard_input import path_of
from truetune.data.token_files import Tokenised
from truetune.data.token_set import TokenSet
from truetune.recipes.tokenise import Limit, Source, Told, check_parts, finish, say_passed_over

Maker = Callable[[Path, float], ShardMaker]  # from the folder of the shards and the share that is held out


def tokenise_in(
    config: TrainConfig, work: Path, told: Told, *, maker: Maker, limit: Limit, when_read: Callable[[bool], None]
) -> Tokenised:
    """Everything that ``recipes.tokenise`` does, with sets in ``work``.

    Args:
        when_read: called once all rows are read, with whether any needs a template.
    Raises:
        DataError, TemplateError: as there.
        OSError: the disk is full, or can't be written.
    """
    source = _shards(config, config.data, maker(work / "data", config.val_split), told)
    say_passed_over(config, told)
    held = _shards(config, config.val_data, maker(work / "held", 0.0), told) if config.val_data else None
    ours = Side(source.keys, config.val_split)
    apart = (held, Side(held.keys, 0.0)) if held else (source, Side(source.keys, config.val_split, held=True))
    to_train, to_hold = ours.count(), apart[1].count()
    if config.val_split:
        check_parts(config, to_train, to_hold)
    alike = likeness_of((source, ours), apart)
    for line in alike.warnings():
        told.warn(line)
    templated = source.templated or apart[0].templated
    when_read(templated)
    train, within = _sets(source, work, "train", config.val_split)
    bad, held_bad = _refused(source, config.val_split)
    held_set = within if config.val_split else None
    if held:
        held_set, _ = _sets(held, work, "apart", 0.0)
        held_bad, _ = _refused(held, 0.0)
    mine = Source(
        _Count(to_train), _rejected(source), source.read, alike,
        letters=sum((Counter(counts.letters) for counts in source.counts), Counter()),
        code_rows=sum(counts.code_rows for counts in source.counts),
        dropped=sum((Counter(c.dropped) for shards in (source, held) if shards for c in shards.counts), Counter()),
    )  # fmt: skip
    theirs = Source(_Count(to_hold), _rejected(held) if held else Rejects(), held.read if held else 0)
    made = finish(config, mine, theirs, (train, bad), (held_set, held_bad), limit, texts=not templated)
    return replace(made, templated=templated)


class _Count(Sequence[Row]):
    """Rows that are counted alone."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: object) -> Row:  # type: ignore[override]
        raise NotImplementedError("rows in shards are not kept")


def _shards(config: TrainConfig, paths: Sequence[str], maker: ShardMaker, told: Told) -> Shards:
    """Make what is not there yet of the shards of these files."""
    maker.folder.mkdir(parents=True, exist_ok=True)
    files = find_files(paths)
    total, done, faulty = sum(Path(path_of(name)).stat().st_size for name in files), 0, 0
    found: dict[int, tuple[str, Counts]] = {}

    def too_many(counts: Counts) -> bool:
        nonlocal faulty
        faulty += counts.faulty
        return faulty > config.max_bad_rows

    with told.screen.bar("tokenising") as show:
        workers = shards_pool.cores()
        for task, counts in shards_pool.make_shards(maker, _tasks(files), workers=workers, too_many=too_many):
            found[task.number] = task.block.file, counts
            done += task.block.size
            show(done, max(done, total))
    in_order = [found[number] for number in range(len(found))]
    shards = Shards(maker.folder, [file for file, _ in in_order], [counts for _, counts in in_order])
    rejected.raise_if_too_many(_rejected(shards), shards.read, max_bad_rows=config.max_bad_rows)
    return shards


def _tasks(files: Sequence[str]) -> Iterator[Task]:
    numbers, before = itertools.count(), 0
    for name in files:
        blocks = blocks_of(name)
        head = _up_to_rows(name, blocks)
        for block in itertools.chain(head, blocks):
            yield Task(next(numbers), block, head[-1], sketched=before < LIMIT)
            before += block.lines_or_rows


def _up_to_rows(name: str, blocks: Iterator[Block]) -> list[Block]:
    """The blocks up to the first one that holds rows; all of them where none does."""
    head: list[Block] = []
    something = False
    for block in blocks:
        rows, rejects = block.read()
        head.append(block)
        something = something or bool(rows or rejects)
        if rows:
            break
    if not something:
        raise no_rows(name)
    return head


def _rejected(shards: Shards) -> Rejects:
    """Rows that could not be read, then rows that could not be understood, and in numbers those left out by choice."""
    left_out: Counter[tuple[str, str, str]] = Counter()
    for file, counts in zip(shards.files, shards.counts, strict=True):
        for reason, by_detail in counts.left_out.items():
            left_out.update({(file, reason, detail): rows for detail, rows in by_detail.items()})
    found = [shards.shard(number).rejects for number, counts in enumerate(shards.counts) if counts.faulty]
    return Rejects((reject for part in (0, 1) for rejects in found for reject in rejects[part]), left_out)


def _refused(shards: Shards, share: float) -> tuple[list[Reject], list[Reject]]:
    """Rows that can't be tokenised: those to train on, and those held out."""
    parts: tuple[list[Reject], list[Reject]] = ([], [])
    for number, counts in enumerate(shards.counts):
        if not counts.refused:
            continue
        shard = shards.shard(number)
        sides = held_out(shard.keys, share)[shard.refused].tolist()
        for reject, side in zip(shard.rejects[2], sides, strict=True):
            parts[side].append(reject)
    return parts


def _sets(shards: Shards, work: Path, stem: str, share: float) -> tuple[TokenSet, TokenSet]:
    """The examples to train on, and those held out."""
    names = list(dict.fromkeys(shards.files))
    writers = [SetWriter(work, name, names) for name in (stem, f"{stem}-held")]
    try:
        for shard in shards:
            side = held_out(shard.keys, share)[shard.places].repeat_interleave(shard.examples.lengths)
            for writer, wanted in zip(writers, (~side, side), strict=True):
                writer.add(shard.examples.kept(wanted))
        return writers[0].close(), writers[1].close()
    finally:
        for writer in writers:
            writer.abandon()
