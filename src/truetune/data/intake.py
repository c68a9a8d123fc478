"""From rows as read to rows as trained on: each file's own format, columns and share, and what is dropped from rows.

An ``Intake`` is called like ``formats.parse_rows``, for all rows at once or block by block, in any process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from truetune.data.formats import Choice, parse_rows
from truetune.data.formats.checks import RowError
from truetune.data.formats.columns import Columns, parse_columns
from truetune.data.mix import take
from truetune.data.policy import Policies
from truetune.data.rejects import excerpt
from truetune.data.schema import RawRow, Reject, Row
from truetune.data.sources import Source, find_sources
from truetune.errors import ConfigError


@dataclass(frozen=True)
class Intake:
    """How rows are taken in.

    Attributes:
        files: of each file that has ways of its own, where it came from.
        columns: which column holds which field, of the files that do not say.
        policies: what is dropped or refused.
        seed: of the choice of rows, where only a share of a file is taken.
    """

    files: Mapping[str, Source] = field(default_factory=dict)
    columns: Columns = field(default_factory=dict)
    policies: Policies = field(default_factory=Policies)
    seed: int = 0

    @classmethod
    def of(
        cls, paths: Sequence[str], *, columns: Sequence[str] = (), policies: Policies | None = None, seed: int = 0
    ) -> Intake:
        """For these sources, as the user names them.

        Raises:
            ConfigError: a mapping of columns that is not understood, or one file with two weights, formats or columns.
            DataError: as ``find_sources``.
        """
        files: dict[str, Source] = {}
        for source in find_sources(paths):
            for file in source.files:
                first = files.setdefault(file, source)
                if min(first.weight, source.weight) < 1 and first.weight != source.weight:
                    raise ConfigError(
                        f"--data: {file} is to be taken {first.weight:g} and {source.weight:g} times",
                        ("way out", f"name it once, with =WEIGHT: {file}={first.weight:g}"),
                    )
                if (first.form, first.columns) != (source.form, source.columns):
                    raise ConfigError(f"--data: {file} is named twice, with other formats or columns")
        return cls(files, parse_columns(columns), policies or Policies(), seed)

    def __call__(
        self,
        raw: Sequence[RawRow],
        form: str,
        *,
        choices: dict[str, Choice] | None = None,
    ) -> tuple[list[Row], list[Reject]]:
        """Rows and rejects, as ``formats.parse_rows``; rows left out by choice are rejects too.

        Args:
            raw: the rows as read.
            form: a format's name; or ``auto``, then files that say theirs are taken at their word.
            choices: what was settled for each file by an earlier block of its rows; what this block settles is added.

        Raises:
            ConfigError, DataError: as ``formats.parse_rows``.
        """
        settled = {} if choices is None else choices
        by_file: dict[str, list[RawRow]] = {}
        for row in raw:
            by_file.setdefault(row.origin.file, []).append(row)
        used: list[Row] = []
        rejects: list[Reject] = []
        for file, rows in by_file.items():
            source = self.files.get(file, Source(file, (file,)))
            wanted = source.form or form if form == "auto" else form
            columns = {**self.columns, **parse_columns([f"{f}={c}" for f, c in source.columns.items()])}
            found, bad = parse_rows(rows, wanted, columns=columns, choices=settled)
            kept, left = self._chosen(found, source.weight)
            used += kept
            rejects += sorted([*bad, *left], key=lambda reject: reject.origin.row)
        return used, rejects

    def _chosen(self, rows: Sequence[Row], weight: float) -> tuple[list[Row], list[Reject]]:
        used: list[Row] = []
        left: list[Reject] = []
        for row in rows:
            try:
                used.append(take(self.policies.apply(row), weight, seed=self.seed))
            except RowError as error:
                said = row.text or "\n".join(message.content for message in row.messages)
                left.append(Reject(row.origin, error.reason, error.detail, excerpt(said)))
        return used, left
