"""What every format asks of a row, each check with its own reason and a sentence that says what was found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from truetune.data.schema import Message
from truetune.errors import nearest

# Every field that some format knows: none of them is a misspelling of another.
FIELDS = {
    "instruction", "input", "context", "output", "response", "history", "system", "system_prompt", "instances",
    "messages", "role", "content", "conversations", "from", "value", "tools", "prompt", "completion", "question",
    "answer", "query", "problem", "solution", "text", "code", "quote", "chosen", "rejected", "response_j",
    "response_k", "label",
}  # fmt: skip
PREFERENCES = (("chosen", "rejected"), ("response_j", "response_k"))  # the better one first
_BLANKS = " \t\n\r\xa0\xad\u200b\u200c\u200d\u2060\ufeff"  # zero-width characters too: such an answer looks empty
_MEDIA = ("images", "image", "videos", "audios")


class RowError(Exception):
    """A row that can't be trained on: ``reason`` is the slug to count by, ``detail`` the sentence."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        self.detail = detail
        super().__init__(detail)


def refuse_unsupervised(value: Mapping[str, Any], *, preferences: bool = True) -> None:
    """Refuse rows made for another kind of training, whatever format their other columns fit.

    Args:
        value: the row.
        preferences: whether those are refused too.

    Raises:
        RowError: ``preference`` (pairs of a better and a worse answer, or answers with a verdict), ``media``.
    """
    way = "no row for supervised training, unless --format chosen takes the better answer of each"
    for pair in PREFERENCES if preferences else ():
        if all(column in value for column in pair):
            names = ", ".join(f"`{column}`" for column in value)
            raise RowError("preference", f"a preference row ({names}): {way}")
    if preferences and isinstance(value.get("label"), bool):
        raise RowError("preference", f"a preference row (`label` true or false judges the answer): {way}")
    for column in _MEDIA:
        if value.get(column):
            detail = f"`{column}` holds {kind(value[column])}: only text can be trained on"
            raise RowError("media", detail)


def text_field(value: Mapping[str, Any], name: str, *, where: str = "", hint: str = "") -> str:
    """A field that must be there and be text; it may be empty.

    Args:
        value: the row, or the turn.
        name: the field.
        where: words before the field's name, such as ``message 2: ``.
        hint: the likely cause, when the caller knows one.

    Raises:
        RowError: ``missing_field`` or ``wrong_type``.
    """
    if name not in value:
        close = nearest(name, [str(key) for key in value if key not in FIELDS])
        cause = hint or (f"is `{close}` meant?" if close else f"the fields are {list_fields(value)}")
        raise RowError("missing_field", f"{where}`{name}` is missing; {cause}")
    if not isinstance(value[name], str):
        detail = f"{where}`{name}` is {kind(value[name])}, text is expected"
        raise RowError("wrong_type", detail + (f"; {hint}" if hint else ""))
    return str(value[name])


def optional_text(value: Mapping[str, Any], name: str, *, where: str = "") -> str:
    """A field that may be absent or null (a Parquet table has null for absent); then ``""``.

    Raises:
        RowError: ``wrong_type``.
    """
    return "" if value.get(name) is None else text_field(value, name, where=where)


def system_message(value: Mapping[str, Any]) -> list[Message]:
    """The row's own `system` (or `system_prompt`) as a message, or none.

    Raises:
        RowError: ``wrong_type``, or ``ambiguous`` where the two differ.
    """
    texts = {text for name in ("system", "system_prompt") if (text := optional_text(value, name))}
    if len(texts) > 1:
        raise RowError("ambiguous", "`system` and `system_prompt` are both there and differ: keep one")
    return [Message("system", text) for text in texts]


def is_blank(text: str) -> bool:
    """Whether there is nothing to be seen in a text."""
    return not text.strip().strip(_BLANKS)


def answer_field(value: Mapping[str, Any], name: str, *, where: str = "") -> str:
    """A text to be learned: like ``text_field``, and not blank.

    Raises:
        RowError: ``missing_field``, ``wrong_type`` or ``empty_output``.
    """
    text = text_field(value, name, where=where)
    if is_blank(text):
        found = "holds white space only" if text else "is empty"
        raise RowError("empty_output", f"{where}`{name}` {found}: nothing to learn from")
    return text


def check_answers(messages: Sequence[Message]) -> None:
    """At least one answer of the assistant, and something in each: a blank one would teach to say nothing.

    Raises:
        RowError: ``no_answer``, ``empty_output``, or ``nothing_trained`` where the row wants none of them trained.
    """
    answers = [(number, message) for number, message in enumerate(messages, 1) if message.role == "assistant"]
    blank = [str(number) for number, answer in answers if is_blank(answer.content) and not answer.tool_calls]
    if answers and not blank:
        if not any(answer.train for _, answer in answers):
            raise RowError("nothing_trained", "every answer is marked as not to be trained")
        return
    if len(blank) < len(answers):
        raise RowError("empty_output", f"message {', '.join(blank)}: the answer is empty or white space only")
    if answers:
        raise RowError("empty_output", "every assistant message is empty or white space only: nothing to learn from")
    if all(message.role == "system" for message in messages):
        found = "only a system message" if len(messages) == 1 else f"{len(messages)} system messages and nothing else"
        raise RowError("no_answer", f"{found}: nothing to learn from")
    roles = ", ".join(message.role for message in messages[:6])
    raise RowError("no_answer", f"no assistant message (found: {roles}): nothing to learn from")


def expect_object(value: Any, *, what: str = "the row") -> Mapping[str, Any]:
    """``value`` as a mapping from field to value.

    Raises:
        RowError: ``not_an_object``.
    """
    if not isinstance(value, dict):
        raise RowError("not_an_object", f"{what} is {kind(value)}, an object with fields is expected")
    return value


def expect_list(value: Mapping[str, Any], name: str) -> list[Any]:
    """A field that must be there and be a list; it may be empty.

    Raises:
        RowError: ``missing_field`` or ``wrong_type``.
    """
    found = value[name] if name in value else text_field(value, name)  # text_field words the missing field
    if isinstance(found, list):
        return found
    cause = "; perhaps the file is CSV, which can't hold lists: use JSON lines" if isinstance(found, str) else ""
    raise RowError("wrong_type", f"`{name}` is {kind(found)}, a list is expected{cause}")


def list_fields(value: Mapping[str, Any]) -> str:
    """The names of a row's fields as a sentence shows them."""
    return ", ".join(f"`{name}`" for name in value) or "none"


def kind(value: Any) -> str:
    """What a value is, in a word or two."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, str):
        return "text"
    return "an object" if isinstance(value, dict) else f"a {type(value).__name__}"
