"""Files into rows: JSON, JSON lines, CSV, TSV, Parquet and plain text, each row with its file and number.

Nothing is guessed and nothing is lost: what can't be read becomes a reject that names its row, and the rows after
it keep their numbers. What the columns mean is the affair of ``truetune.data.formats``.
"""

from __future__ import annotations

from collections.abc import Sequence

from truetune.data.read_blocks import Parts, blocks_of, no_rows
from truetune.data.sources import find_files


def read_rows(paths: Sequence[str]) -> Parts:
    """Read files, folders and globs.

    Args:
        paths: as the user gave them; ``Origin.file`` of a row is such a path, or one joined from a folder or glob.
    Returns:
        The rows that could be read and those that could not, each in the order of files and rows.

    Raises:
        DataError: a path that does not exist, a file that can't be read as a whole or has no rows.
    """
    parts: list[Parts] = []
    for name in find_files(paths):
        found = [block.read() for block in blocks_of(name)]
        if not any(rows or rejects for rows, rejects in found):
            raise no_rows(name)
        parts += found
    return [row for rows, _ in parts for row in rows], [reject for _, rejects in parts for reject in rejects]
