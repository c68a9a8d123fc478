"""Answers of a given form: which tokens may come next, so that the whole is JSON of a schema, or a call of a tool.

A grammar says which texts there are (in llguidance's dialect of Lark, which can hold JSON schemas). Every answer walks
through it on its own: before a token is chosen all others are ruled out, so what is left of the probabilities is drawn
from as ever, and an answer depends on no other row.
"""

from __future__ import annotations

import functools
import json
import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from truetune.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

LONGEST = 120_000
"""Characters of a grammar: OpenAI's own limit for a schema."""
_KEPT = 16
# Without an end to white space a model that is unsure of itself writes nothing else.
_SPACE = r"[ \n\r\t]{1,40}"


def of_json(schema: Mapping[str, Any]) -> str:
    """The rule, to stand on the right of a name, for JSON of a schema."""
    # Settings under this key would be the library's: one of them makes it drop what it does not know.
    return f"%json {json.dumps({**schema, 'x-guidance': {'whitespace_pattern': _SPACE}})}"


def literal(text: str) -> str:
    """The rule of one text."""
    return json.dumps(text)


def whole(rule: str) -> str:
    """The grammar whose texts are those of one rule."""
    return f"start: {rule}\n"


class Guide:
    """Where one answer is in its grammar."""

    def __init__(self, matcher: LLMatcher, ends: Collection[int]) -> None:
        self._matcher, self._ends = matcher, list(ends)

    def allowed(self, size: int, stop_ids: Collection[int]) -> Tensor:
        """[size] bool: the tokens that may come next; those of ``stop_ids`` where the answer may end.

        Raises:
            ModelError: the grammar is too hard to follow here, or no token of the vocabulary goes on with it.
        """
        packed = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        self._check()
        bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8)).bitwise_and_(1).flatten()[:size].bool()
        found = torch.zeros(size, dtype=torch.bool)
        found[: len(bits)] = bits
        found[[i for i in self._ends if i < size]] = False  # the library's own idea of an end
        found[[i for i in stop_ids if i < size]] = self._matcher.is_accepting()
        if not bool(found.any()):
            raise ModelError("the answer can't go on: no token of the vocabulary fits its form")
        return found

    def took(self, token: int) -> None:
        """Go on by a token. Raises ModelError for one that was not allowed."""
        self._matcher.consume_token(token)
        self._check()

    @property
    def is_whole(self) -> bool:
        """Whether nothing can follow any more."""
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ModelError(f"the answer's form can't be followed: {_first_line(self._matcher.get_error())}")


class Grammar:
    """A grammar that was understood."""

    def __init__(self, matcher: LLMatcher, ends: Collection[int]) -> None:
        self._matcher, self._ends = matcher, tuple(ends)

    def guide(self) -> Guide:
        """For one answer, from its start."""
        return Guide(self._matcher.deep_copy(), self._ends)


class Grammars:
    """Reads grammars for one tokenizer, and keeps those that were asked for last. From any thread.

    Args:
        tokenizer: transformers' own. It is laid out for the library once, with the first grammar.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._hf = tokenizer
        self._known: OrderedDict[str, Grammar] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, text: str) -> Grammar:
        """A grammar.

        Raises:
            ConfigError: it has a fault, asks for what can't be done, or is too large; llguidance is not installed.
        """
        with self._lock:
            if text in self._known:
                self._known.move_to_end(text)
                return self._known[text]
        if len(text) > LONGEST:
            raise ConfigError(f"the form has {len(text):,} characters", ("expected", f"at most {LONGEST:,}"))
        found = self._compiled(text)
        with self._lock:
            self._known[text] = found
            while len(self._known) > _KEPT:
                self._known.popitem(last=False)
        return found

    def _compiled(self, text: str) -> Grammar:
        with self._lock:
            tokenizer = self._tokenizer
        from llguidance import LLMatcher, LLParserLimits

        # A lexer's state takes a kilobyte or two: the worst of grammars is left some 20 MB.
        limits = LLParserLimits(max_lexer_states=10_000, verbose_errors=False)
        matcher = LLMatcher(tokenizer, text, log_level=0, limits=limits)
        if matcher.is_error():
            raise ConfigError(f"no answer can have this form: {_first_line(matcher.get_error())}")
        found = Grammar(matcher, tokenizer.eos_tokens)
        try:
            found.guide().allowed(tokenizer.vocab_size, ())
        except ModelError:  # it refers to itself and to nothing else
            raise ConfigError("no answer can have this form: no text begins as it asks") from None
        return found

    @functools.cached_property
    def _tokenizer(self) -> LLTokenizer:
        try:
            from llguidance import LLTokenizer
        except ImportError:
            raise ConfigError("an answer of a given form needs llguidance, which is not installed",
                              ("way out", "pip install 'truetune[json]'")) from None  # fmt: skip
        core = getattr(self._hf, "backend_tokenizer", None)
        if core is None:
            raise ConfigError("an answer of a given form needs a fast tokenizer, and this model has none")
        try:
            return LLTokenizer(core.to_str(), n_vocab=len(self._hf), eos_token=self._hf.eos_token_id)
        except ValueError as error:
            raise ConfigError(f"answers of a given form can't be had with this tokenizer: {_first_line(str(error))}") \
                from None  # fmt: skip


def _first_line(said: str) -> str:
    line = said.strip().partition("\n")[0]
    return line.partition("failed to compile JSON schema: ")[2] or line
