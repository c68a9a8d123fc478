"""A tokenizer of the ``tokenizers`` library as the ``tokenizer.ggml`` keys of a GGUF.

llama.cpp knows three kinds: byte-level BPE with merges (``gpt2``), SentencePiece's BPE, which joins what scores highest
(``llama``), and SentencePiece's unigrams (``t5``). How text is cut before the merges is not in the file but a name that
its code knows; an expression that is none of these is refused, because the same text would become other tokens.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from truetune.errors import ModelError
from truetune.export.gguf_arch import Value
from truetune.export.gguf_cuts import check_pieces, cut_of, is_prepended, joins_blanks, kind_of, parts, scheme_of


class TokenType(IntEnum):
    """llama.cpp's ``llama_token_type``."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Specials:
    """Ids with a meaning, and whether a text is framed by them; None where there is none."""

    bos: int | None
    eos: int | None
    unknown: int | None
    pad: int | None
    adds_bos: bool
    adds_eos: bool
    stops: Sequence[int] = ()  # all that end an answer; ``eos`` may be among them
    opens: bool = False  # whether every prompt begins with an added token


def tokenizer_keys(core: Mapping[str, Any], rows: int, specials: Specials, template: str | None) -> dict[str, Value]:
    """All keys under ``tokenizer``.

    Args:
        core: ``tokenizer.json``.
        rows: of the embedding table; ids that have no token are filled up, as llama.cpp wants them.
        template: Jinja source of the chat template.
    Raises:
        ModelError: a kind of tokenizer, or a way to cut texts, that llama.cpp has no name for.
    """
    model = core["model"]
    match kind_of(core):
        case "gpt2":
            own: dict[str, Value] = {"pre": cut_of(core), "merges": [_merge(pair) for pair in model["merges"]]}
            own["add_space_prefix"] = any(p.get("add_prefix_space") for p in parts(core.get("pre_tokenizer")))
            vocabulary, kind = dict(model["vocab"]), "gpt2"
        case "llama":
            check_pieces(core)
            vocabulary, kind = dict(model["vocab"]), "llama"
            own = {"pre": "default", "add_space_prefix": _prepends(core, specials)}
            own["scores"] = _filled(_scores_of_merges(vocabulary, model["merges"]), rows, core, 0.0)
        case _:
            check_pieces(core)
            vocabulary, kind = {piece: i for i, (piece, _) in enumerate(model["vocab"])}, "t5"
            own = {"pre": "default", "add_space_prefix": _prepends(core, specials)}
            scores = {i: float(score) for i, (_, score) in enumerate(model["vocab"])}
            own["scores"] = _filled(scores, rows, core, 0.0)
            own |= _charsmap(core)
            own |= {"remove_extra_whitespaces": True} if own["add_space_prefix"] and joins_blanks(core) else {}
    tokens, types = _tokens(vocabulary, core, rows, byte_pieces=kind == "llama")
    keys: dict[str, Value] = {"model": kind, **own, "tokens": tokens, "token_type": types, **_special_keys(specials)}
    found: dict[str, Value] = {f"tokenizer.ggml.{name}": value for name, value in keys.items()}
    return found | ({"tokenizer.chat_template": template} if template else {})


def _merge(pair: str | Sequence[str]) -> str:
    """The two halves with a blank between them; a blank inside one is written as byte-level BPE writes it."""
    return pair if isinstance(pair, str) else " ".join(half.replace(" ", "Ġ") for half in pair)


def _scores_of_merges(vocabulary: Mapping[str, int], merges: Sequence[str | Sequence[str]]) -> dict[int, float]:
    """Id → score: the earlier a token is joined, the higher; what is never joined has no use for one."""
    scores: dict[int, float] = {}
    for rank, pair in enumerate(merges):
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        joined = vocabulary.get(left + right)
        if joined is not None:
            scores.setdefault(joined, -float(rank))
    lowest = -float(len(merges))
    return {number: scores.get(number, lowest) for number in vocabulary.values()}


def _filled(scores: Mapping[int, float], rows: int, core: Mapping[str, Any], default: float) -> list[float]:
    return [scores.get(number, default) for number in range(_length(core, rows))]


def _length(core: Mapping[str, Any], rows: int) -> int:
    """As many tokens as the table has rows: llama.cpp takes no other number."""
    last = max((int(token["id"]) for token in core.get("added_tokens", ())), default=-1)
    if last >= rows:
        raise ModelError(f"the tokenizer has a token {last}, and the model's table only {rows} rows")
    return rows


def _tokens(
    vocabulary: Mapping[str, int], core: Mapping[str, Any], rows: int, *, byte_pieces: bool
) -> tuple[list[str], list[int]]:
    """``(texts, types)`` by id."""
    tokens = [f"[PAD{number}]" for number in range(_length(core, rows))]
    types = [int(TokenType.UNUSED)] * len(tokens)
    unknown = _unknown(core)
    for text, number in vocabulary.items():
        if number >= len(tokens):
            raise ModelError(f"the tokenizer has a token {number}, and the model's table only {rows} rows")
        tokens[number] = text
        is_byte = byte_pieces and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        types[number] = int(TokenType.BYTE if is_byte else TokenType.NORMAL)
        if text == unknown:
            types[number] = int(TokenType.UNKNOWN)
    for token in core.get("added_tokens", ()):
        number = int(token["id"])
        tokens[number] = token["content"]
        if types[number] != TokenType.UNKNOWN:
            types[number] = int(TokenType.CONTROL if token.get("special") else TokenType.USER_DEFINED)
    return tokens, types


def _unknown(core: Mapping[str, Any]) -> str | None:
    model = core["model"]
    if model["type"] == "Unigram":
        number = model.get("unk_id")
        return None if number is None else str(model["vocab"][number][0])
    found: str | None = model.get("unk_token")
    return found


def _prepends(core: Mapping[str, Any], specials: Specials) -> bool:
    """Whether llama.cpp is to put a blank in front of every stretch of text between special tokens.

    A tokenizer that puts it in front of the first alone never does in prompts that begin with a special token.
    """
    scheme = scheme_of(core)
    return is_prepended(core) or scheme == "always" or (scheme == "first" and not specials.opens)


def _charsmap(core: Mapping[str, Any]) -> dict[str, Value]:
    """SentencePiece's table of normalised characters, as the bytes it is."""
    for part in parts(core.get("normalizer")):
        if part["type"] == "Precompiled" and part.get("precompiled_charsmap"):
            return {"precompiled_charsmap": list(base64.b64decode(part["precompiled_charsmap"]))}
    return {}


def _special_keys(specials: Specials) -> dict[str, Value]:
    others = [number for number in specials.stops if number != specials.eos]
    named = {
        "bos_token_id": specials.bos,
        "eos_token_id": specials.eos,
        "unknown_token_id": specials.unknown,
        "padding_token_id": specials.pad,
        # An answer ends at each; what a turn was trained to end with is often not the end of a text.
        "eot_token_id": others[0] if others else None,
        "eom_token_id": others[1] if len(others) > 1 else None,
        "add_bos_token": specials.adds_bos,
        "add_eos_token": specials.adds_eos,
    }
    return {name: value for name, value in named.items() if value is not None}
