"""A chat template in Ollama's language (Go's text/template), found by rendering the Jinja one and looking at the text.

What is rendered are conversations of words that no template contains, so that all between them is the template's own.
From these texts a form is read off: a beginning, the same words around every answer and every later question, and
where a system message goes. The form is then held against other conversations; a template that words one of them
differently has more in it than the form can say, and is refused.

https://github.com/ollama/ollama/blob/main/docs/template.md
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from truetune.data.schema import Message
from truetune.data.template import Template, TextEncoder
from truetune.errors import TemplateError

_SYSTEM = "SYSTEMxWORDS"
_QUESTIONS, _ANSWERS = ("QUESTIONxONE", "QUESTIONxTWO", "QUESTIONxTHREE"), ("ANSWERxONE", "ANSWERxTWO")


@dataclass(frozen=True)
class Form:
    """The words of a template, around the turns of a conversation.

    Attributes:
        head: in front of the first question.
        prompt: after a question, where an answer begins.
        given: after that, in front of an answer that was given.
        next: between an answer and the next question.

    In each, the system message stands as the word ``SYSTEMxWORDS``.
    """

    head: str
    prompt: str
    given: str
    next: str

    def render(self, system: str | None, questions: Sequence[str], answers: Sequence[str]) -> str:
        """The text of a conversation that ends in a question, up to where its answer begins."""
        text = self.head
        for question, answer in itertools.zip_longest(questions, answers):
            text += question + self.prompt + ("" if answer is None else self.given + answer + self.next)
        return text.replace(_SYSTEM, system or "")


@dataclass(frozen=True)
class GoTemplate:
    """The text of ``TEMPLATE``, and what a reader should know about it."""

    text: str
    remarks: tuple[str, ...] = ()


BARE = GoTemplate("{{ .Prompt }}", ("no chat template: the prompt is continued as it is",))


def go_template(template: Template, encoder: TextEncoder) -> GoTemplate:
    """The same wording in Go's language.

    Raises:
        TemplateError: one that a form of these parts can't say; with a conversation that shows it.
    """
    bare, told = _form(template, encoder, system=None), _form(template, encoder, system=_SYSTEM)
    _check(template, encoder, bare, told)
    remarks = ["tools are not in it: Ollama words them by its own names"] if "tools" in template.source else []
    spaced = _rendered(template, encoder, None, (f"  {_QUESTIONS[0]}  ",), ())
    if f"  {_QUESTIONS[0]}  " not in spaced:
        remarks.append("the template strips blanks around a message, and Ollama passes them on as they are")
    return GoTemplate(_in_go(bare, told), tuple(remarks))


def _rendered(
    template: Template, encoder: TextEncoder, system: str | None, questions: Sequence[str], answers: Sequence[str]
) -> str:
    """The text up to where an answer begins, without the start token that Ollama puts in front by itself."""
    messages = [Message("system", system)] if system is not None else []
    for question, answer in itertools.zip_longest(questions, answers):
        messages.append(Message("user", question, instruction=question, input=""))
        if answer is not None:
            messages.append(Message("assistant", answer))
    text = template.render(encoder, messages, prompt=True)
    return text.removeprefix(encoder.bos_token) if encoder.bos_token else text


def _form(template: Template, encoder: TextEncoder, *, system: str | None) -> Form:
    """Read the form off a conversation of two questions."""
    text = _rendered(template, encoder, system, _QUESTIONS[:2], _ANSWERS[:1])
    words = (_QUESTIONS[0], _ANSWERS[0], _QUESTIONS[1])
    found = re.fullmatch("(.*?)" + "(.*?)".join(words) + "(.*)", text, re.DOTALL)
    if found is None or any(text.count(word) != 1 for word in words):
        raise _refused(template, "a conversation's turns are not each told once, in their order", text)
    if not found[2].startswith(found[4]):
        raise _refused(template, "an answer that is still to come begins otherwise than one that was given", text)
    return Form(found[1], found[4], found[2].removeprefix(found[4]), found[3])


def _check(template: Template, encoder: TextEncoder, bare: Form, told: Form) -> None:
    """Hold both forms against other conversations: longer ones, and contents of another kind."""
    odd = ("What is 2 < 3 & 4?\n\nSay it twice.", "`{{x}}` and {% y %} \\n", "ünïcödé 水")
    for questions, given in ((_QUESTIONS, _ANSWERS), (_QUESTIONS[:1], ()), (odd, ("Yes.\nIt is.", "<b>no</b>"))):
        for system, form in ((None, bare), ("Be brief & kind.\nAlways.", told)):
            real = _rendered(template, encoder, system, questions, given)
            if real != form.render(system, questions, given):
                raise _refused(template, "it words this conversation otherwise than others", real)


def _refused(template: Template, because: str, text: str) -> TemplateError:
    shown = text if len(text) <= 300 else f"{text[:200]} … {text[-90:]}"
    return TemplateError(
        f"the chat template '{template.name}' can't be said in Ollama's language",
        ("because", because),
        ("text", shown),
        ("way out", "--to gguf, which keeps the Jinja template for llama.cpp itself"),
    )


def _in_go(bare: Form, told: Form) -> str:
    """The two forms as one template; no line break that is not the template's own."""
    first = _either(told.head, bare.head)
    later = _either(told.next, bare.next)
    question = f"{{{{ if $first }}}}{first}{{{{ $first = false }}}}{{{{ else }}}}{later}{{{{ end }}}}"
    asked = f"{question}{{{{ .Content }}}}{_either(told.prompt, bare.prompt)}"
    return (
        '{{ $first := true }}{{ range .Messages }}{{ if eq .Role "user" }}'
        f'{asked}{{{{ else if eq .Role "assistant" }}}}{_either(told.given, bare.given)}{{{{ .Content }}}}'
        "{{ end }}{{ end }}"
    )


def _either(told: str, bare: str) -> str:
    """Literal text that depends on whether there is a system message, or does not."""
    if told == bare:
        return _literal(bare)
    return f"{{{{ if $.System }}}}{_literal(told)}{{{{ else }}}}{_literal(bare)}{{{{ end }}}}"


def _literal(text: str) -> str:
    """Text as Go takes it, braces that open an action among it."""
    parts = (part.replace("{{", '{{ "{{" }}') for part in text.split(_SYSTEM))
    return "{{ $.System }}".join(parts)
