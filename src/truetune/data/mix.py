"""Which rows of a source are seen: a share of them, chosen by what they say, so that every run takes the same ones."""

from __future__ import annotations

import hashlib

from truetune.data.formats.checks import RowError
from truetune.data.schema import Row
from truetune.data.split import content_hash


def take(row: Row, share: float, *, seed: int) -> Row:
    """The row, if it is among the ``share`` of all that are seen.

    Whether it is depends on its content and on ``seed`` alone: neither on its place nor on the rows around it. Of two
    shares the smaller one's rows are all among the larger one's.

    Raises:
        RowError: ``sampled_out``.
    """
    if share < 1:
        # Not the content's hash itself: that one chooses the held-out rows, which are to be a sample of these.
        number = hashlib.sha256(f"{seed} {content_hash(row)}".encode()).hexdigest()[:13]
        if int(number, 16) >= share * 16**13:
            raise RowError("sampled_out", f"not among the share of {share:g} that is taken of its file")
    return row
