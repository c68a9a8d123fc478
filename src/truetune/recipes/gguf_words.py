"""A tokenizer with its template and stop tokens, as the keys of a GGUF or as a Modelfile: for the files, and to hold
files against."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from truetune.data.schema import Message
from truetune.data.template import Template, with_default_system
from truetune.errors import ModelError, TemplateError
from truetune.export import modelfile, ollama
from truetune.export.gguf_arch import Value
from truetune.export.gguf_tokenizer import Specials, tokenizer_keys
from truetune.export.gguf_vocabulary import Vocabulary
from truetune.models.tokenizer import ChatTokenizer


def words_of(
    tokenizer: ChatTokenizer, template: Template | None, card: Mapping[str, Any], rows: int
) -> dict[str, Value]:
    """All keys under ``tokenizer``.

    Args:
        card: ``truetune.json`` of what was trained.
        rows: of the embedding table.
    Raises:
        ModelError: a tokenizer that llama.cpp has no name for.
    """
    source = with_default_system(template.source, card.get("system")) if template else None
    return tokenizer_keys(core_of(tokenizer), rows, _specials(tokenizer, template, card), source)


def core_of(tokenizer: ChatTokenizer) -> dict[str, Any]:
    """``tokenizer.json``, of the tokenizer as it is now."""
    backend = getattr(tokenizer.hf, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            "the tokenizer is no fast one, and only these can be written as a GGUF",
            ("expected", "a tokenizer.json beside the weights"),
        )
    found: dict[str, Any] = json.loads(backend.to_str())
    return found


def stops_of(tokenizer: ChatTokenizer, card: Mapping[str, Any]) -> list[int]:
    """What ends an answer: what was trained to, and the tokenizer's own."""
    return list(dict.fromkeys([*card.get("stop_ids", ()), *sorted(tokenizer.stop_ids)]))


def modelfile_of(
    tokenizer: ChatTokenizer, template: Template | None, card: Mapping[str, Any], *, system: str | None, adapter: bool
) -> tuple[modelfile.Modelfile, Sequence[str]]:
    """``(what Ollama is told of a model, what its reader should know of that)``.

    Args:
        card: ``truetune.json`` of what was trained.
        adapter: whether an adapter's file lies beside the model's.
    Raises:
        TemplateError: a template that can't be said in Ollama's language.
    """
    go = ollama.go_template(template, tokenizer) if template else ollama.BARE
    stops = tuple(tokenizer.decode([number]) for number in stops_of(tokenizer, card))
    beside = f"./{modelfile.ADAPTER}" if adapter else None
    return modelfile.Modelfile(f"./{modelfile.MODEL}", go.text, beside, system, stops), go.remarks


def reader_of(vocabulary: Vocabulary, tokenizer: ChatTokenizer) -> Callable[[str], list[int]]:
    """How llama.cpp cuts a text into tokens by a file's keys, with the pieces of the trained tokenizer.

    Of SentencePiece's BPE it knows one wording: a blank in front of every stretch of text, or of none. A tokenizer that
    puts it in front of the first stretch alone is another one there, and this shows it.
    """
    if vocabulary.get("model") != "llama":
        return lambda text: tokenizer.encode([text])[0]
    from tokenizers import Tokenizer

    core = core_of(tokenizer)
    steps: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    if vocabulary.get("add_space_prefix"):
        steps.insert(0, {"type": "Prepend", "prepend": "▁"})
    changed = core | {"normalizer": {"type": "Sequence", "normalizers": steps}, "pre_tokenizer": None}
    reader = Tokenizer.from_str(json.dumps(changed))
    return lambda text: list(reader.encode(text, add_special_tokens=False).ids)


def _specials(tokenizer: ChatTokenizer, template: Template | None, card: Mapping[str, Any]) -> Specials:
    hf, stops, first = tokenizer.hf, stops_of(tokenizer, card), _first_token(tokenizer, template)
    return Specials(
        bos=hf.bos_token_id,
        # Without an end of its own, llama.cpp would take some number for one.
        eos=hf.eos_token_id if hf.eos_token_id is not None else next(iter(stops), None),
        unknown=hf.unk_token_id,
        pad=hf.pad_token_id,
        adds_bos=bool(tokenizer.bos_token) and first == hf.bos_token_id,
        adds_eos=False,  # llama.cpp would put it after every prompt
        stops=stops,
        opens=first in hf.added_tokens_decoder,
    )


def _first_token(tokenizer: ChatTokenizer, template: Template | None) -> int:
    """What a prompt begins with: of bare text, and as the template words one."""
    text = tokenizer.bos_token + "a"
    if template is not None:
        # One that wants something else of a conversation is taken for one that begins like bare text.
        with contextlib.suppress(TemplateError):
            text = template.render(tokenizer, [Message("user", "a", instruction="a", input="")], prompt=True) or text
    return tokenizer.encode([text])[0][0]
