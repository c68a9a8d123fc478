"""``truetune chat``: a conversation in the terminal, with the prompts of training and as many adapters as are named."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from truetune.adapters.inject import attachment
from truetune.config.chat import ChatConfig
from truetune.config.resolve import Resolved
from truetune.data.schema import Message
from truetune.errors import ConfigError, OutputError, TruetuneError, counted, nearest
from truetune.generate.engine import Engine
from truetune.generate.request import Delta, Request
from truetune.recipes.generate import ADAPTER, Speaker, check_prompt, engine_of, load_speaker, request_for
from truetune.train.log import Screen

HELP = """\
/system TEXT       what the model is told first; without TEXT nothing
/adapter NAME      answer with this adapter; NAME=FOLDER loads one, no NAME answers with the base
/base TEXT         one question, answered by the base and by the adapter
/reset             forget the conversation
/save FILE.jsonl   write the conversation as a row to train on
/help, /exit       a line that ends in \\ goes on in the next; Ctrl-C stops an answer"""


def run(resolved: Resolved[ChatConfig]) -> dict[str, Any]:
    """Talk until the input ends; answers go to stdout, everything else to stderr."""
    screen = Screen()
    speaker = load_speaker(resolved.config, screen, attached=False)
    engine = engine_of(resolved.config, speaker, rows=2)
    chat = Chat(resolved.config, speaker, engine, screen)
    if chat.is_terminal:
        screen.say(
            "chat", f"{resolved.config.model}{' with ' + str(speaker.adapter) if speaker.adapter else ''} · /help"
        )
    engine.start()
    try:
        while (line := chat.read()) is not None:
            try:
                if not chat.hear(line):
                    break
            except TruetuneError as error:
                screen.console.print(f"error: {error}", markup=False)
    finally:
        engine.stop(drain=False)
    return {"turns": chat.answers, "new_tokens": chat.tokens}


@dataclass
class Chat:
    """One conversation."""

    config: ChatConfig
    speaker: Speaker
    engine: Engine
    screen: Screen
    turns: list[Message] = field(default_factory=list)
    answers: int = 0
    tokens: int = 0

    def __post_init__(self) -> None:
        self.system = self.config.system
        self.adapter = ADAPTER if self.speaker.adapter is not None else None
        self.is_terminal = sys.stdin.isatty()
        if self.is_terminal:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 - input() edits lines and remembers them with it

    def read(self) -> str | None:
        """What the user says next; None at the end of the input. Ctrl-C drops the line that is being written."""
        lines: list[str] = []
        while True:
            try:
                line = self._line("… " if lines else "> ")
            except KeyboardInterrupt:
                self.screen.console.print()
                lines = []
                continue
            if line is None:
                return "\n".join(lines) if lines else None
            if line.endswith("\\"):
                lines.append(line[:-1])
                continue
            whole = "\n".join([*lines, line])
            if whole.strip():
                return whole
            lines = []

    def _line(self, prompt: str) -> str | None:
        if not self.is_terminal:
            line = sys.stdin.readline()
            return line.rstrip("\n") if line else None
        try:
            return input(prompt)
        except EOFError:
            self.screen.console.print()
            return None

    def hear(self, line: str) -> bool:
        """Do what a line says; False to leave."""
        if not line.startswith("/"):
            self._answer(line)
            return True
        word, _, rest = line[1:].partition(" ")
        known: dict[str, Callable[[str], None]] = {
            "system": self._set_system, "adapter": self._set_adapter, "base": self._compare, "reset": self._reset,
            "save": self._save, "help": lambda _: self.screen.console.print(HELP, markup=False),
        }  # fmt: skip
        if word in ("exit", "quit"):
            return False
        if word not in known:
            raise ConfigError(f"there is no /{word}", ("did you mean", nearest(word, known)), ("help", "/help"))
        known[word](rest.strip())
        return True

    def _answer(self, text: str) -> None:
        self.turns.append(_said(text))
        try:
            answer = self._ask(self.adapter)
        except TruetuneError:
            self.turns.pop()
            raise
        self.turns.append(Message("assistant", answer))

    def _ask(self, adapter: str | None) -> str:
        """Show the answer to the conversation so far; Ctrl-C stops it, and what there is stays."""
        ids = self.speaker.conversation_ids(self.turns, self.system)
        check_prompt(ids, self.speaker, "the conversation")
        like = request_for(self.config, self.speaker, ids)
        handle = self.engine.submit(
            Request(ids, adapter, like.sampling, like.max_new_tokens, like.stop, self._stop_ids(adapter))
        )
        began, text, new, end = time.perf_counter(), "", 0, Delta()
        while end.finish is None:
            try:
                end = next(handle)
                text, new = text + end.text, new + len(end.ids)
                sys.stdout.write(end.text)
                sys.stdout.flush()
            except KeyboardInterrupt:
                handle.cancel()
        sys.stdout.write("\n")
        sys.stdout.flush()
        self.answers, self.tokens = self.answers + 1, self.tokens + new
        if end.finish == "error":
            raise ConfigError(f"no answer: {end.error}")
        why = {"cancelled": " · stopped", "length": " · cut"}.get(end.finish, "")
        if self.is_terminal:
            speed = new / max(time.perf_counter() - began, 1e-9)
            self.screen.console.print(f"[dim]{counted(new, 'token')} · {speed:,.1f} tok/s{why}[/dim]")
        return text

    def _stop_ids(self, adapter: str | None) -> frozenset[int]:
        own = self.engine.adapters.get(adapter).stop_ids if adapter is not None else frozenset()
        return self.speaker.stop_ids | own

    def _set_system(self, text: str) -> None:
        if text and self.speaker.template is None:
            raise ConfigError("/system needs a template to stand in, and this prompt is continued as bare text")
        self.system = text or None
        self.screen.say("system", text or "none")

    def _set_adapter(self, text: str) -> None:
        name, given, folder = text.partition("=")
        if given:
            self.engine.adapters.register(name.strip(), folder.strip())
        elif name:
            self.engine.adapters.check(name)
        else:
            self._check_base()
        self.adapter = name.strip() or None
        others = ", ".join(self.engine.adapters.names())
        self.screen.say("adapter", (self.adapter or "none: the base") + (f" · known: {others}" if others else ""))

    def _check_base(self) -> None:
        """That what answers without an adapter is the base."""
        if attachment(self.speaker.model) is not None:
            raise ConfigError(
                "the adapter is a part of the model here, so the base can't be asked alone",
                ("way out", "truetune chat without --adapter, for the base"),
            )

    def _compare(self, text: str) -> None:
        """The same question twice; the conversation does not remember it."""
        if not text:
            raise ConfigError("/base needs a question", ("expected", "/base TEXT"))
        self._check_base()
        self.turns.append(_said(text))
        try:
            for label, adapter in (("base", None), (self.adapter or "", self.adapter)):
                if label:
                    self.screen.say(label, "")
                    self._ask(adapter)
        finally:
            self.turns.pop()

    def _reset(self, _: str) -> None:
        self.turns.clear()
        self.screen.say("reset", "the conversation is forgotten")

    def _save(self, name: str) -> None:
        if not name or not self.turns:
            raise ConfigError("/save needs a file's name and something to save", ("expected", "/save FILE.jsonl"))
        head = [{"role": "system", "content": self.system}] if self.system is not None else []
        row = {"messages": [*head, *({"role": turn.role, "content": turn.content} for turn in self.turns)]}
        try:
            with Path(name).expanduser().open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        except OSError as error:
            raise OutputError(f"/save: {name} can't be written: {error}") from None
        self.screen.say("saved", f"{name}: {len(self.turns)} turns, one row")


def _said(text: str) -> Message:
    return Message("user", text, instruction=text, input="")
