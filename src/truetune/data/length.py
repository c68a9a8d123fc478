"""Rows over the limit: left out, cut by a stated rule, or an error; never shortened in silence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor

from truetune.data.rejects import EXCERPT, excerpt
from truetune.data.schema import Reject
from truetune.data.token_set import TokenSet
from truetune.errors import DataError

OnOverlong = Literal["auto", "error", "drop", "truncate"]


def limit_lengths(
    examples: TokenSet,
    max_length: int,
    *,
    policy: OnOverlong,
    say: Callable[[str], None],
    decode: Callable[[Sequence[int]], str],
    texts: bool = False,
    most: int | None = None,
) -> tuple[TokenSet, list[Reject]]:
    """Apply ``--on-overlong``.

    ``auto`` leaves out up to 1 % of the rows (a single row in any case) and is an error above that.

    Args:
        say: told one line about every kind of change.
        decode: ids into text, for the start of a row in its reject.
        texts: whether the examples are plain texts, all of them.
        most: tokens that the model was made for, where that is known: the limit can't be raised beyond.
    Raises:
        DataError: naming each row and its length.
    """
    long = _over(examples, max_length)
    if not long:
        return examples, []
    if policy == "error" or (policy == "auto" and len(long) > max(1, len(examples) // 100)):
        raise _overlong_error(examples, long, max_length, texts=texts, most=most)
    if policy == "truncate":
        say(_cut_words(examples, long, max_length))
        return _rebuild(examples, max_length, cut=True), []
    are = "is" if len(long) == 1 else "are"
    say(f"{_rows(len(long))} over {max_length:,} tokens {are} left out: {_listing(examples, long)}")
    rejects = [
        Reject(
            examples.origins[i], "over_length",
            f"{examples.lengths_of([i])[0]:,} tokens, the limit is {max_length:,}",
            excerpt(decode(examples.example(i)[0][:EXCERPT].tolist())),
        )
        for i in long
    ]  # fmt: skip
    return _rebuild(examples, max_length, cut=False), rejects


def truncation(before: TokenSet, after: TokenSet) -> dict[str, int]:
    """What ``--on-overlong truncate`` cut off: rows that were shortened, the tokens they lost, and of those rows the
    ones that now end within an answer, without the stop token behind it."""
    if len(before) != len(after):  # another policy: rows were left out whole, which is counted as rejects
        return {"rows": 0, "tokens": 0, "without_stop": 0}
    first = rows = broken = 0
    for whole in before.stretches():
        # Not the stretches of ``after``: they are bounded by tokens too, so that shorter rows part elsewhere.
        lengths = after.between(first, first + len(whole)).lengths
        shorter: list[int] = (whole.lengths - lengths).nonzero()[:, 0].tolist()
        rows += len(shorter)
        broken += sum(_breaks_an_answer(whole, i, int(lengths[i])) for i in shorter)
        first += len(whole)
    return {"rows": rows, "tokens": len(before.tokens) - len(after.tokens), "without_stop": broken}


def _over(examples: TokenSet, max_length: int) -> list[int]:
    """The examples of more than ``max_length`` tokens."""
    found: list[int] = []
    before = 0
    for part in examples.stretches():
        found += ((part.lengths > max_length).nonzero()[:, 0] + before).tolist()
        before += len(part)
    return found


def _off_the_front(trained: Tensor, max_length: int) -> int:
    """How many tokens of an example that is too long go from its start, behind the first.

    The start of the prompt goes first (all but a quarter of the limit, and never what opens the text), because an
    answer without its question's end is worth less than a question without its start. What is still too long loses its
    end, and with it the stop token: a model must not learn to stop in mid-sentence.
    """
    prompt = int(trained.nonzero()[0, 0]) if bool(trained.any()) else len(trained)
    return min(len(trained) - max_length, max(0, prompt - max(1, max_length // 4)))


def _breaks_an_answer(examples: TokenSet, index: int, max_length: int) -> bool:
    """Whether cutting ends the example between two trained tokens."""
    _, trained = examples.example(index)
    end = _off_the_front(trained, max_length) + max_length
    return end < len(trained) and bool(trained[end - 1]) and bool(trained[end])


def _cut_words(examples: TokenSet, rows: list[int], max_length: int) -> str:
    broken = sum(_breaks_an_answer(examples, i, max_length) for i in rows)
    one = broken == 1
    stops = f" ({broken:,} within {'an answer, which then has' if one else 'answers, which then have'} no stop token)"
    was = "was" if len(rows) == 1 else "were"
    head = f"{_rows(len(rows))} over {max_length:,} tokens {was} cut{stops if broken else ''}"
    return f"{head}: {_listing(examples, rows)}"


def _rows(count: int) -> str:
    return f"{count:,} row{'s' if count != 1 else ''}"


def _rebuild(examples: TokenSet, max_length: int, *, cut: bool) -> TokenSet:
    """The examples, the long ones cut or left out, written part by part where they are in files."""
    return examples.gathered(_part(part, max_length, cut=cut) for part in examples.stretches())


def _part(examples: TokenSet, max_length: int, *, cut: bool) -> TokenSet:
    lengths = examples.lengths
    wanted = (lengths <= max_length).repeat_interleave(lengths)
    for i in (lengths > max_length).nonzero()[:, 0].tolist() if cut else ():
        begin = int(examples.offsets[i])
        front = begin + _off_the_front(examples.example(i)[1], max_length)
        wanted[begin] = True
        wanted[front + 1 : front + max_length] = True
    return examples.kept(wanted)


def _listing(examples: TokenSet, rows: list[int]) -> str:
    lengths = examples.lengths_of(rows[:5])
    named = [f"{examples.origins[i]} ({length:,})" for i, length in zip(rows[:5], lengths, strict=True)]
    return ", ".join(named) + (f", … {len(rows) - 5} more" if len(rows) > 5 else "")


def _overlong_error(
    examples: TokenSet, rows: list[int], max_length: int, *, texts: bool, most: int | None
) -> DataError:
    lengths = examples.lengths_of(rows[:20])
    listing = "\n".join(f"{examples.origins[i]}: {n:,} tokens" for i, n in zip(rows[:20], lengths, strict=True))
    more = f"\n… and {len(rows) - 20} more" if len(rows) > 20 else ""
    are = "is" if len(rows) == 1 else "are"
    return DataError(
        f"{len(rows):,} of {_rows(len(examples))} {are} longer than {max_length:,} tokens",
        ("rows", listing + more),
        ("way out", "--on-overlong drop leaves them out, --on-overlong truncate cuts them"),
        ("or", _higher(max_length, max(examples.lengths_of(rows)), most)),
        ("or", "--text-blocks joins the texts and cuts them into blocks, with nothing lost" if texts else ""),
    )


def _higher(max_length: int, longest: int, most: int | None) -> str:
    """What a higher limit would do; ``""`` where the model has no room for one."""
    if most is None or longest <= most:
        return f"--max-length {longest} takes them all, with more memory"
    return f"--max-length {most}, the most that the model was made for" if max_length < most else ""
