"""Ollama's Modelfile: which GGUF files make a model, how its prompts are worded, and what ends an answer.

https://github.com/ollama/ollama/blob/main/docs/modelfile.md
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from truetune.errors import TemplateError

FILE, MODEL, ADAPTER = "Modelfile", "model.gguf", "adapter.gguf"
"""The files of a folder for Ollama."""

# A value in three quotation marks may go over lines; PARAMETER and MESSAGE have a name of their own in front of it.
_INSTRUCTION = re.compile(
    r'^[ \t]*(?P<what>(?:PARAMETER|MESSAGE)[ \t]+\w+|[A-Z]+)[ \t]+(?P<value>"""[\s\S]*?"""|"[^"]*"|[^\n]*)',
    re.IGNORECASE | re.MULTILINE,
)
_STOP = "PARAMETER STOP"
_WORDING = ("MESSAGE", "RENDERER", "PARSER")


@dataclass(frozen=True)
class Modelfile:
    """What a Modelfile says, as far as it words prompts and ends answers.

    Attributes:
        model, adapter: paths of GGUF files as seen from the Modelfile, or names of Ollama's own.
        template: in Go's language; None leaves it to Ollama.
        system: the message for conversations that bring none.
        stops: texts that end an answer.
        more: other instructions that word prompts.
    """

    model: str
    template: str | None
    adapter: str | None = None
    system: str | None = None
    stops: tuple[str, ...] = ()
    more: tuple[str, ...] = ()

    def text(self) -> str:
        """The file's contents.

        Raises:
            TemplateError: a text that a Modelfile has no way to quote.
        """
        lines = [f"FROM {self.model}"] + ([f"ADAPTER {self.adapter}"] if self.adapter else [])
        lines += [f"TEMPLATE {_quoted(self.template, 'template')}"] if self.template is not None else []
        lines += [f"SYSTEM {_quoted(self.system, 'system message')}"] if self.system else []
        lines += [f"PARAMETER stop {_quoted(text, 'stop text')}" for text in dict.fromkeys(self.stops) if text]
        return "\n".join(lines) + "\n"

    @classmethod
    def of(cls, text: str) -> Modelfile:
        """Read one. Of what stands twice the last counts, as it does for Ollama; of stop texts all do."""
        said = [
            (" ".join(found["what"].upper().split()), _bare(found["value"])) for found in _INSTRUCTION.finditer(text)
        ]
        last = dict(said)
        return cls(
            model=last.get("FROM", ""),
            template=last.get("TEMPLATE"),
            adapter=last.get("ADAPTER"),
            system=last.get("SYSTEM") or None,
            stops=tuple(value for what, value in said if what == _STOP),
            more=tuple(dict.fromkeys(what.split()[0] for what, _ in said if what.split()[0] in _WORDING)),
        )

    def differences(self, trained: Modelfile) -> list[str]:
        """In what it words prompts, or cuts answers, otherwise than a model was trained to; as sentences."""
        said = []
        if self.template is None:
            said.append("the Modelfile has no TEMPLATE, so that Ollama would choose one")
        elif trained.template is not None and self.template != trained.template:
            parted = _first_difference(self.template, trained.template)
            said.append(f"the Modelfile's TEMPLATE is not what trained: {parted}")
        if self.system != trained.system:
            said.append(f"the Modelfile's SYSTEM is {_shown(self.system)}, and was {_shown(trained.system)}")
        if self.more:
            said.append(f"the Modelfile words prompts by {', '.join(self.more)} as well, which no training did")
        if cuts := [stop for stop in self.stops if stop not in trained.stops]:
            said.append(f"answers would end at {', '.join(map(repr, cuts))} (PARAMETER stop), which no training taught")
        return said


def _quoted(text: str, what: str) -> str:
    if '"""' in text or text.endswith('"'):
        raise TemplateError(
            f'the {what} has quotation marks in it that a Modelfile can\'t hold (""")',
            ("way out", "--to gguf, which keeps the Jinja template, and a Modelfile written by hand"),
        )
    return f'"""{text}"""'


def _bare(value: str) -> str:
    for quotes in ('"""', '"'):
        if len(value) >= 2 * len(quotes) and value.startswith(quotes) and value.endswith(quotes):
            return value[len(quotes) : -len(quotes)]
    return value.strip()


def _shown(system: str | None) -> str:
    return repr(system) if system else "none"


def _first_difference(found: str, wanted: str) -> str:
    """Both texts from a little before where they part."""
    at = next((n for n, (one, other) in enumerate(zip(found, wanted, strict=False)) if one != other), None)
    at = min(len(found), len(wanted)) if at is None else at
    start = max(at - 20, 0)
    return f"{found[start : at + 20]!r}, and was {wanted[start : at + 20]!r}"
