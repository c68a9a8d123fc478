"""Rows over the limit: left out, cut by a stated rule, or an error; never shortened in silence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from truetune.data.schema import Reject, TokenSet
from truetune.errors import DataError

_AT_ONCE = 4096  # examples that are in memory together, where all of them are in files

OnOverlong = Literal["auto", "error", "drop", "truncate"]


def limit_lengths(
    examples: TokenSet, max_length: int, policy: OnOverlong, say: Callable[[str], None]
) -> tuple[TokenSet, list[Reject]]:
    """Apply ``--on-overlong``.

    ``auto`` leaves out up to 1 % of the rows (a single row in any case) and is an error above that.

    Args:
        say: told one line about every kind of change.
    Raises:
        DataError: naming each row and its length.
    """
    long: list[int] = (examples.lengths > max_length).nonzero()[:, 0].tolist()
    if not long:
        return examples, []
    if policy == "error" or (policy == "auto" and len(long) > max(1, len(examples) // 100)):
        raise _overlong_error(examples, long, max_length)
    if policy == "truncate":
        say(f"{len(long)} rows over {max_length:,} tokens were cut: {_listing(examples, long)}")
        return _rebuild(examples, set(), max_length), []
    say(f"{len(long)} rows over {max_length:,} tokens are left out: {_listing(examples, long)}")
    rejects = [
        Reject(examples.origins[i], "over_length", f"{int(examples.lengths[i]):,} tokens, the limit is {max_length:,}")
        for i in long
    ]
    return _rebuild(examples, set(long), max_length), rejects


def truncation(before: TokenSet, after: TokenSet) -> dict[str, int]:
    """What ``--on-overlong truncate`` cut off: rows that were shortened, and the tokens they lost."""
    if len(before) != len(after):  # another policy: rows were left out whole, which is counted as rejects
        return {"rows": 0, "tokens": 0}
    lost = before.lengths - after.lengths
    return {"rows": int(lost.count_nonzero()), "tokens": int(lost.sum())}


def shorten(tokens: Tensor, trained: Tensor, max_length: int) -> tuple[Tensor, Tensor]:
    """Cut one example to ``max_length`` tokens.

    The start of the prompt goes first (all but a quarter of the limit, and never what opens the text), because an
    answer without its question's end is worth less than a question without its start. What is still too long loses its
    end, and with it the stop token: a model must not learn to stop in mid-sentence.
    """
    over = len(tokens) - max_length
    if over <= 0:
        return tokens, trained
    prompt = int(trained.nonzero()[0, 0]) if bool(trained.any()) else len(tokens)
    front = min(over, max(0, prompt - max(1, max_length // 4)))
    keep = [*range(1), *range(1 + front, len(tokens))][:max_length]
    return tokens[keep], trained[keep]


def _rebuild(examples: TokenSet, without: set[int], max_length: int) -> TokenSet:
    count = len(examples)
    return examples.gathered(
        _part(examples, [i for i in range(first, min(first + _AT_ONCE, count)) if i not in without], max_length)
        for first in range(0, count, _AT_ONCE)
    )


def _part(examples: TokenSet, kept: list[int], max_length: int) -> TokenSet:
    cut = [shorten(*examples.example(i), max_length) for i in kept]
    return TokenSet.from_lists(
        [t.tolist() for t, _ in cut], [f.tolist() for _, f in cut], [examples.origins[i] for i in kept]
    )


def _listing(examples: TokenSet, rows: list[int]) -> str:
    named = [f"{examples.origins[i]} ({int(examples.lengths[i]):,})" for i in rows[:5]]
    return ", ".join(named) + (f", … {len(rows) - 5} more" if len(rows) > 5 else "")


def _overlong_error(examples: TokenSet, rows: list[int], max_length: int) -> DataError:
    listing = "\n".join(f"{examples.origins[i]}: {int(examples.lengths[i]):,} tokens" for i in rows[:20])
    more = f"\n… and {len(rows) - 20} more" if len(rows) > 20 else ""
    return DataError(
        f"{len(rows)} of {len(examples)} rows are longer than {max_length:,} tokens",
        ("rows", listing + more),
        (
            "way out",
            "--on-overlong drop leaves them out, --on-overlong truncate cuts them, --max-length N raises the limit",
        ),
    )
