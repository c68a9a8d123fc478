"""The named chat templates: one Jinja file each, as its family words conversations, and the tokens each needs.

Contents are kept byte for byte where a family's own template strips them. A source that does not name the start token
itself gets it in front, where the tokenizer puts one in front of texts. Of each message they say m['role'] and not
m.role: there the sandbox looks for an attribute first, and takes a quarter longer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

_NEEDS: Mapping[str, tuple[str, ...]] = {
    "alpaca": (),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "deepseek": ("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "llama2": ("<s>", "</s>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "mistral": (),
    "phi3": ("<|user|>", "<|assistant|>", "<|end|>"),
    "plain": (),
    "qwen": ("<|im_start|>", "<|im_end|>"),
    "tulu": (),
    "vicuna": (),
    "zephyr": (),
}


class _Sources(Mapping[str, str]):
    """Name → Jinja source, each file read when it is asked for."""

    def __getitem__(self, name: str) -> str:
        if name not in _NEEDS:
            raise KeyError(name)
        return (Path(__file__).parent / f"{name}.jinja").read_text(encoding="utf-8").removesuffix("\n")

    def __iter__(self) -> Iterator[str]:
        return iter(_NEEDS)

    def __len__(self) -> int:
        return len(_NEEDS)


BUILT_IN: Mapping[str, str] = _Sources()


def needed_tokens(name: str) -> tuple[str, ...]:
    """The tokens without which a tokenizer can't word this template, as its family does."""
    return _NEEDS[name]
