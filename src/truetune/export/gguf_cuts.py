"""How a tokenizer cuts a text before it looks for its tokens, and whether llama.cpp would cut it there too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from truetune.errors import ModelError

_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_CUTS = {
    rf"{_SHORT}{_LETTERS}|\p{{N}}{{1,3}}{_TAIL}": "llama-bpe",
    rf"{_SHORT}{_LETTERS}|\p{{N}}{_TAIL}": "qwen2",
    "ByteLevel": "gpt-2",
    "Digits ByteLevel": "smollm",
}
"""Expression → its name in llama.cpp's ``tokenizer.ggml.pre``."""


def check_tokenizer(core: Mapping[str, Any]) -> None:
    """Raises ModelError where ``tokenizer_keys`` would, whatever the number of rows."""
    if kind_of(core) == "gpt2":
        cut_of(core)
    else:
        check_pieces(core)


def left_out(core: Mapping[str, Any], *, prefixed: bool = False) -> list[str]:
    """What the tokenizer does to texts before it cuts them, and a GGUF of its kind has no word for.

    Args:
        prefixed: whether the file says that a blank is put in front of texts.
    """
    kind = kind_of(core)
    joins = kind == "t5" and prefixed and joins_blanks(core)
    known = {"gpt2": {"NFC"}, "llama": {"Prepend"}, "t5": {"Prepend", "Precompiled"}}[kind]
    blanks = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    found = [
        f"{part['type']} {part.get('pattern', {}).get('Regex', '')}".strip()
        for part in parts(core.get("normalizer"))
        if part["type"] not in known and part != blanks and not (joins and part["type"] in ("Replace", "Strip"))
    ]
    if prefixed and scheme_of(core) != "never":
        found += [] if joins else ["no second blank in front of a text that begins with one"]
        found += ["a blank in front of the first text alone"] if scheme_of(core) == "first" else []
    if prefixed and kind == "t5" and is_prepended(core):
        found.append("a blank in front of a text of blanks alone")
    return found


def kind_of(core: Mapping[str, Any]) -> str:
    """``gpt2``, ``llama`` or ``t5``, as llama.cpp calls them. Raises ModelError: none of these."""
    model = core["model"]
    steps = {part["type"] for part in parts(core.get("pre_tokenizer"))}
    if model["type"] == "BPE":
        return "gpt2" if "ByteLevel" in steps else "llama"
    if model["type"] == "Unigram":
        return "t5"
    raise ModelError(
        f"a tokenizer of kind {model['type']} can't be written as a GGUF", ("expected", "BPE or Unigram"),
        ("way out", "--to hf"),
    )  # fmt: skip


def parts(step: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """The steps of a sequence one by one, or the one step that there is."""
    if step is None:
        return
    inner = next((step[name] for name in ("pretokenizers", "normalizers", "decoders") if name in step), None)
    if inner is None:
        yield step
    else:
        for part in inner:
            yield from parts(part)


def cut_of(core: Mapping[str, Any]) -> str:
    """llama.cpp's name for how texts are cut into words. Raises ModelError: it has none."""
    said = []
    for part in parts(core.get("pre_tokenizer")):
        if part["type"] == "Split":
            said.append(str(part["pattern"].get("Regex", part["pattern"])))
        elif part["type"] == "Digits" and part.get("individual_digits"):
            said.append("Digits")
        elif part["type"] == "ByteLevel":
            said += ["ByteLevel"] if part.get("use_regex", True) else []
        else:
            said.append(part["type"])
    changes = left_out(core)
    found = _CUTS.get(" ".join(said))
    if found is None or changes:
        raise _nameless([*changes, *said], ", ".join(_CUTS.values()))
    return found


def check_pieces(core: Mapping[str, Any]) -> None:
    """That nothing but blanks cuts a text before SentencePiece's pieces are looked for, as it is in llama.cpp.

    Raises:
        ModelError: something does, or a piece is looked for in another way.
    """
    model = core["model"]
    said = [
        part["type"]
        for part in parts(core.get("pre_tokenizer"))
        # Gemma's cuts at blanks, of which there are none left by then.
        if part["type"] != "Metaspace" and (part["type"], part.get("pattern")) != ("Split", {"String": " "})
    ]
    said += [name for name in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(name)]
    if model["type"] == "Unigram" and model.get("byte_fallback"):
        said.append("bytes where no unigram fits (byte_fallback)")
    if model["type"] == "BPE" and "<0x00>" not in model["vocab"]:
        said.append("what has no piece is unknown")  # llama.cpp looks for its bytes, and ends where there are none
    if said:
        raise _nameless(said, "pieces that begin with ▁, of texts that nothing else cuts")


def _nameless(found: Sequence[str], known: str) -> ModelError:
    return ModelError(
        "the tokenizer cuts texts into words in a way that llama.cpp has no name for",
        ("found", " then ".join(found) or "no cut at all"),
        ("known", known),
        ("way out", "--to hf: transformers reads the tokenizer as it is"),
    )


def is_prepended(core: Mapping[str, Any]) -> bool:
    """Whether something is put in front of every text."""
    return any(part["type"] == "Prepend" for part in parts(core.get("normalizer")))


def joins_blanks(core: Mapping[str, Any]) -> bool:
    """Whether blanks in a row become one, and those at the end none, as SentencePiece has it unless told otherwise.

    Its table of characters makes blanks of line feeds and tabs before; without it, they would be stripped as well.
    """
    steps = list(parts(core.get("normalizer")))
    joins = any(part["type"] == "Replace" and part["pattern"] == {"Regex": " {2,}"} for part in steps)
    return joins and {"Precompiled", "Strip"} <= {part["type"] for part in steps}


def scheme_of(core: Mapping[str, Any]) -> str:
    """Where a blank is put in front: ``always``, ``first`` (of the first text alone) or ``never``."""
    found = next((part for part in parts(core.get("pre_tokenizer")) if part["type"] == "Metaspace"), None)
    return "never" if found is None else str(found.get("prepend_scheme", "always"))
