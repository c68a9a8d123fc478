"""Where the answers of a conversation stand in its rendered text: each behind the very prompt that generation sends.

Exact is to render the conversation anew up to each answer and with it. That takes time by the square of the turns, so
where there are many answers, each is rendered behind the first exchange and the few turns before it, and has to be what
the whole text says there, letter by letter. Answers at doubling distances are rendered in full all the same. Where
anything differs, all of them are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from truetune.data.left_out import left_out
from truetune.data.schema import Message
from truetune.errors import TemplateError

Say = Callable[..., str]  # Template.render with all but the turns settled
Span = tuple[int, int]

_EXACT = 16  # answers that are all rendered in full
_TURNS = 4  # in front of an answer that are rendered with it, where not all of them are


def answer_spans(messages: Sequence[Message], wanted: Sequence[int], full: str, say: Say) -> tuple[Span, ...]:
    """Where the answers ``messages[i]``, i in ``wanted`` (ascending), begin and end in ``full``, the rendered whole.

    An answer ends with the last character that is no blank.

    Raises:
        TemplateError: a prompt differs from what would be served, or the template leaves out a part of an answer.
    """
    spans = _nearby(messages, wanted, full, say) if len(wanted) > _EXACT else None
    return spans or tuple(_answer(messages, i, full, say) for i in wanted)


def _answer(messages: Sequence[Message], index: int, full: str, say: Say) -> Span:
    """Where the answer in ``messages[index]`` stands in ``full``: behind the prompt that would be served for it."""
    before = say(messages[:index], prompt=True)
    upto = (full if index + 1 == len(messages) else say(messages[: index + 1], prompt=False)).rstrip()
    if not full.startswith(upto):
        raise TemplateError(
            f"the template words turn {index + 1} differently once more turns follow, so what is trained would not "
            "be what is served; --train-on last trains the last answer alone"
        )
    if not upto.startswith(before):
        raise TemplateError(
            f"the prompt that the template makes for the answer in turn {index + 1} is not how the text begins that "
            "would be trained (it opens its reasoning in another way, perhaps), so another prompt would be served"
        )
    if part := left_out(messages[index], upto[len(before) :]):
        raise TemplateError(
            f"the template leaves out a part of the answer in turn {index + 1} ({part}), so it would not be learned; "
            + (
                "--thinking drop trains without it"
                if part == "its reasoning"
                else "--template FILE with one that keeps it"
            )
        )
    return len(before), len(upto)


def _nearby(messages: Sequence[Message], wanted: Sequence[int], full: str, say: Say) -> tuple[Span, ...] | None:
    """``answer_spans`` from the turns around each answer; None where those do not tell, or something is wrong."""
    try:
        spans = [_answer(messages, wanted[0], full, say)]
        near = 0  # the last answer that stands far enough in front of the one that is looked at
        for number in range(1, len(wanted)):
            while wanted[near + 1] < wanted[number] - _TURNS:
                near += 1
            window = messages[wanted[near] + 1 : wanted[number] + 1]
            found = _behind(messages[: wanted[0] + 1], spans[0][1], window, (full, spans[near][1]), say)
            if found is None:
                return None
            spans.append(found)
        checked = {1 << power for power in range(len(wanted).bit_length() - 1)} | {len(wanted) - 1}
        same = all(_answer(messages, wanted[number], full, say) == spans[number] for number in checked)
    except TemplateError:
        return None
    return tuple(spans) if same else None


def _behind(
    head: Sequence[Message], opening: int, window: Sequence[Message], whole: tuple[str, int], say: Say
) -> Span | None:
    """Where the answer at the end of ``window`` stands in the whole text, as it is rendered behind ``head`` alone.

    Args:
        opening: characters that the text of ``head`` takes.
        whole: that text, and where in it ``window`` begins.
    Returns:
        None where it is rendered otherwise than it stands there.
    """
    turns = [*head, *window]
    before = say(turns[:-1], prompt=True)[opening:]
    upto = say(turns, prompt=False).rstrip()[opening:]
    full, start = whole
    if not (full.startswith(upto, start) and upto.startswith(before)) or left_out(window[-1], upto[len(before) :]):
        return None
    return start + len(before), start + len(upto)
