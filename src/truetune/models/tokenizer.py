"""A tokenizer of transformers, as the data layer needs it."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from truetune.errors import ModelError, TemplateError
from truetune.models.load import known_copy
from truetune.models.names import is_local, model_folder, only_local

# Ends of a turn that families use beside, or instead of, the tokenizer's own end token.
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|return|>", "<|call|>")

# One of these is what a tokenizer is read from.
_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "spiece.model")
# What any of its files may be called: settings, vocabularies, chat templates, and the configs that name its class.
_PATTERNS = ("*.json", "*.txt", "*.model", "*.jinja", "*/*.jinja")
# Ways to cut a text into words that leave its characters as they are.
_CUTTING = ("ByteLevel", "Split", "Digits", "Punctuation")
# What turns text and templates into ids, beside those files and our own code.
_LIBRARIES = ("tokenizers", "transformers", "jinja2")


class ChatTokenizer:
    """Encodes, decodes and renders; see ``data.template.TextEncoder`` for the contract."""

    def __init__(self, tokenizer: Any, generation_stops: Sequence[int] = (), folder: Path | None = None) -> None:
        self.hf = tokenizer
        self.folder = folder  # with its files, where it was read from one
        self.added: dict[str, int] = {}  # tokens that it did not have
        own = tokenizer.chat_template
        # Some tokenizers bring several by name; the one for plain conversations is called default.
        self.own_template: str | None = own.get("default") if isinstance(own, Mapping) else own
        self.eos_token: str = tokenizer.eos_token or ""
        self.bos_token: str = tokenizer.bos_token if self._adds_bos() else ""
        vocabulary = tokenizer.get_vocab()  # made anew whenever it is asked for
        ends = [vocabulary[token] for token in _TURN_ENDS if token in vocabulary]
        end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        self.stop_ids = frozenset([*end, *generation_stops, *ends])

    @classmethod
    def load(cls, name: str, *, revision: str | None = None) -> ChatTokenizer:
        """The tokenizer of a model's folder or Hub name.

        Raises:
            ModelError: there is none, or it can't be read.
        """
        from transformers import AutoTokenizer

        source = str(model_folder(name)) if is_local(name) else name
        options = {"revision": revision, "local_files_only": only_local(name)}
        if is_local(name) and not any((Path(source) / file).is_file() for file in _FILES):
            raise ModelError(
                f"--model: {name} has no tokenizer",
                ("expected", "tokenizer.json and tokenizer_config.json beside the weights"),
                ("way out", "copy them from the model this one was made from"),
            )
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **options)
        except Exception as error:  # the library raises whatever its parsers raise
            raise ModelError(
                f"--model: the tokenizer of {name} can't be loaded",
                ("because", " ".join(str(error).split())[:400] or type(error).__name__),
                ("way out", "fetch tokenizer.json and tokenizer_config.json again"),
            ) from None
        return cls(tokenizer, _generation_stops(source, options), known_copy(name, revision=revision))

    @functools.cached_property
    def identity(self) -> str | None:
        """SHA-256 of all that decides which ids a text becomes: the files, and the versions of what reads them.

        None where that can't be told: no folder is known, or another library than ``tokenizers`` does the work.
        """
        if self.folder is None or not self.hf.is_fast:
            return None
        facts = [(name, version(name)) for name in _LIBRARIES] + list(self.added.items())
        digest = hashlib.sha256(repr(facts).encode())
        try:
            for path in sorted({path for pattern in _PATTERNS for path in self.folder.glob(pattern)}):
                digest.update(repr((path.name, hashlib.sha256(path.read_bytes()).digest())).encode())
        except OSError:
            return None
        return digest.hexdigest()

    @property
    def vocabulary_hash(self) -> str:
        """SHA-256 of its tokens in the order of their ids, without those that were added here."""
        ids = {token: number for token, number in self.hf.get_vocab().items() if token not in self.added}
        return hashlib.sha256("\0".join(sorted(ids, key=ids.__getitem__)).encode()).hexdigest()

    @property
    def rules(self) -> tuple[Any, Any]:
        """How pieces of text are joined: merges in their order, and the scores of pieces; None where there are none."""
        backend = getattr(self.hf, "backend_tokenizer", None)
        model = json.loads(backend.to_str())["model"] if backend is not None else {}
        pieces = model.get("vocab")
        return model.get("merges"), pieces if isinstance(pieces, list) else None

    def _adds_bos(self) -> bool:
        ids = self.hf("a", add_special_tokens=True)["input_ids"]
        return self.hf.bos_token_id is not None and ids[:1] == [self.hf.bos_token_id]

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids that stand for no text of a row: starts, ends, and what else the vocabulary marks as special."""
        added = [number for number, token in self.hf.added_tokens_decoder.items() if token.special]
        return frozenset([*self.hf.all_special_ids, *added, *self.stop_ids])

    def has_token(self, text: str) -> bool:
        """Whether ``text`` is one token of the vocabulary."""
        return text in self.hf.get_vocab()

    def id_of(self, token: str) -> int | None:
        """The id of a token; None where there is no such."""
        found = self.hf.get_vocab().get(token)
        return None if found is None else int(found)

    def add(self, tokens: Sequence[str]) -> dict[str, int]:
        """Add tokens that it does not have, as they are written; returns the id of each.

        They are plain tokens, not special ones: text that is decoded shows them.
        """
        from transformers import AddedToken

        self.hf.add_tokens([AddedToken(token, normalized=False, special=False) for token in tokens])
        vocabulary = self.hf.get_vocab()
        new = {token: int(vocabulary[token]) for token in tokens}
        self.added |= new
        self.__dict__.pop("identity", None)  # of the tokens that there were
        return new

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, with no special token added; special tokens written out in the text are recognised."""
        if not texts:
            return []
        if self._core is not None:  # the same ids, and none of what transformers makes beside them
            return [found.ids for found in self._core.encode_batch_fast(list(texts), add_special_tokens=False)]
        ids: list[list[int]] = self.hf(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    @functools.cached_property
    def _core(self) -> Any:
        """The tokenizer underneath, where it does the whole work: nothing is cut or filled up there."""
        core = getattr(self.hf, "backend_tokenizer", None)
        if core is None or core.truncation or core.padding or not hasattr(core, "encode_batch_fast"):
            return None
        return core

    @functools.cached_property
    def by_words(self) -> bool:
        """Whether a text is cut into words by a pattern, and no token depends on anything but its own word.

        So it is with byte-level tokenizers (GPT-2, Llama 3, Qwen, SmolLM and most others). It is not where a text is
        one word or a blank is put in front of it (SentencePiece), where characters are rewritten by more than Unicode's
        composition (NFC, which joins none to a line break), or where an added token reaches beyond its own characters:
        to blanks beside it, into the next line, or around another one that ends a turn. Patterns are not looked into.
        """
        core = self._core
        if core is None or type(core.model).__name__ != "BPE":
            return False
        if core.normalizer is not None and type(core.normalizer).__name__ != "NFC":
            return False
        added = core.get_added_tokens_decoder()
        stops = [added[number].content for number in self.stop_ids if number in added]
        if any(_reaches_out(token, stops) for token in added.values()):
            return False
        found = json.loads(core.pre_tokenizer.__getstate__()) if core.pre_tokenizer else {}
        steps = found.get("pretokenizers", [found])
        whole = all(step["type"] in _CUTTING and not step.get("add_prefix_space") for step in steps if step)
        return whole and any(step.get("use_regex") or "Regex" in step.get("pattern", ()) for step in steps)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included."""
        return str(self.hf.decode(list(ids), skip_special_tokens=False))

    def render(self, messages: Sequence[Mapping[str, Any]], source: str, *, tools: Any, prompt: bool) -> str:
        """Run a Jinja template in transformers' sandbox.

        Raises:
            TemplateError: the template has a fault, or refuses the conversation.
        """
        try:
            return str(
                self.hf.apply_chat_template(
                    list(messages), chat_template=source, tools=tools, tokenize=False, add_generation_prompt=prompt
                )
            )
        except Exception as error:  # a template is the user's program: it may fail in any way a program can
            said = " ".join(str(error).split()) or type(error).__name__
            raise TemplateError(f"the chat template refuses this conversation: {said}") from None

    def save(self, folder: Path, template: str | None = None) -> None:
        """Write the tokenizer's files, with ``template`` as its chat template when given."""
        before = self.hf.chat_template
        try:
            if template is not None:
                self.hf.chat_template = template
            self.hf.save_pretrained(str(folder))
        finally:
            self.hf.chat_template = before


def _reaches_out(token: Any, stops: Sequence[str]) -> bool:
    """Whether an added token may take in more than it says, or a part of what another border stands behind."""
    text = token.content
    lines = any(line and not line[0].isspace() for line in text.split("\n")[1:])
    return token.lstrip or token.rstrip or token.single_word or lines or any(s in text and s != text for s in stops)


def _generation_stops(source: str, options: Mapping[str, Any]) -> list[int]:
    """The ids that end a generation by the model's generation config."""
    from transformers import GenerationConfig

    try:
        stops = GenerationConfig.from_pretrained(source, **options).eos_token_id
    except (OSError, ValueError):
        return []
    return stops if isinstance(stops, list) else [stops] if stops is not None else []
