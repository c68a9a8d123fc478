"""Conversations of many turns: the short way to their answers and tokens gives what the plain one gives."""

import functools
import json
from collections.abc import Sequence
from functools import cache
from itertools import accumulate, chain, pairwise
from typing import cast

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from conftest import CHATML, SHARED
from truetune.data import answers, borders
from truetune.data.left_out import Text, left_out
from truetune.data.mask import TrainOn, encode_rows
from truetune.data.schema import Message, Origin, Reject, Row
from truetune.data.template import Template, TextEncoder, pin_date
from truetune.data.templates import BUILT_IN, needed_tokens
from truetune.models.tokenizer import ChatTokenizer

MODELS = SHARED / "models"
pytestmark = pytest.mark.skipif(not MODELS.is_dir(), reason=f"the real tokenizers are not in {MODELS}")

TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
ASKED = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
LOOP = "{% for m in messages %}" + TURN + "{% endfor %}" + ASKED
ALONE = (
    "{% if m.role == 'tool' and messages[loop.index0 - 1].role != 'assistant' %}{{ raise_exception('no') }}{% endif %}"
)
# Templates that look around: some are sound, others word an earlier turn differently once more follow.
AROUND = {
    "counts the turns in front of each": LOOP.replace("{{ m.content }}", "{{ loop.index }}. {{ m.content }}"),
    "says at the start how many turns there are": "{{ messages | length }} turns\n" + LOOP,
    "says at the start whether there are many": "{{ 'many' if messages | length > 9 else 'few' }}\n" + LOOP,
    "marks the last turn": LOOP.replace("{{ m.content }}", "{{ 'last: ' if loop.last }}{{ m.content }}"),
    "shows the last six turns": LOOP.replace("in messages", "in messages[-6:]"),
    "tells each turn what the first one said": LOOP.replace(
        "{{ m.content }}", "{{ messages[0].content }}{{ m.content }}"
    ),
    "tells each turn what the one before it said": LOOP.replace(
        "{{ m.content }}", "{{ messages[loop.index0 - 1].content if loop.index0 }}{{ m.content }}"
    ),
    "tells each turn what the next one says": LOOP.replace(
        "{{ m.content }}", "{{ messages[loop.index0 + 1].content if not loop.last }}{{ m.content }}"
    ),
    "opens an answer by the number of turns": LOOP.replace(
        "assistant\n{% endif", "assistant\n{{ messages | length }}. {% endif"
    ),
    "words the prompts of long conversations otherwise": LOOP.replace(
        "assistant\n{% endif", "assistant\n{{ '!' if messages | length > 7 }}{% endif"
    ),
    "refuses tools behind anything but a call": LOOP.replace(TURN, ALONE + TURN),
    "strips what is said": LOOP.replace("{{ m.content }}", "{{ m.content.strip() }}"),
    "drops the thoughts of all but the last answer": LOOP.replace(
        "{{ m.content }}", "{{ m.reasoning_content if m.reasoning_content and loop.last }}{{ m.content }}"
    ),
    "ends a turn without a stop": LOOP.replace("<|im_end|>", "|"),
}


# What is taken for a word by Qwen 2, 2.5 and 3 (Llama 3 differs in its numbers), and by o200k, gpt-oss' among others.
_UPPER, _LOWER, _ENDS = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BLANKS = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {
    "qwen": _ENDS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _BLANKS,
    "o200k": rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _BLANKS,
}


@cache
def tokenizer(name: str, tokens: tuple[str, ...] = ()) -> ChatTokenizer:
    from transformers import AutoTokenizer, logging

    logging.set_verbosity_error()
    if name in PATTERNS:
        from tokenizers import Regex, normalizers, pre_tokenizers

        found = tokenizer("gpt2").hf.__class__.from_pretrained(str(MODELS / "tokenizers" / "gpt2"))
        words = pre_tokenizers.Split(Regex(PATTERNS[name]), "isolated")
        found.backend_tokenizer.normalizer = normalizers.NFC()
        found.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        return ChatTokenizer(found)
    folder = MODELS / "stories260K" if name == "stories260K" else MODELS / "tokenizers" / name
    hf = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    if tokens:
        hf.add_special_tokens({"additional_special_tokens": list(tokens)})
    return ChatTokenizer(hf)


@cache
def family(name: str) -> tuple[Template, ChatTokenizer]:
    """A family's own template, and a tokenizer that has its tokens."""
    config = json.loads((MODELS / "tokenizer_configs" / name / "tokenizer_config.json").read_text())
    source = pin_date(Template(name, config["chat_template"]), "2026-01-01")
    if name.startswith("mistral"):
        return source, tokenizer("mistral")
    if name.startswith(("deepseek", "gpt-oss")):
        marks = ("<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<|return|>", "<|start|>", "<|end|>")
        return source, tokenizer("gpt2", marks)
    return source, tokenizer("minimind")


FAMILIES = sorted(path.parent.name for path in (MODELS / "tokenizer_configs").glob("*/tokenizer_config.json"))
# Line breaks and blanks at the edges are what tokenizers join, and templates strip.
WORDS = st.sampled_from(
    ["Hello.", "2 + 2", " blank", "end ", "\nline", "line\n", "\n", "日本 😀", "e\u0301", "1", "", "###"]
)


@st.composite
def talks(draw: st.DrawFn) -> Row:
    """Turns by turns, with what agents and people do in between: two answers in a row, tools, thoughts."""
    turns = [Message("system", draw(WORDS))] if draw(st.booleans()) else []
    odd = draw(st.booleans())
    for _ in range(draw(st.integers(1, 9))):
        said = draw(WORDS)
        turns.append(Message("user", said, instruction=said, input=""))
        if odd and draw(st.integers(0, 4)) == 0:
            turns += [Message("assistant", draw(WORDS)), Message("tool", draw(WORDS))]
        thought = draw(st.sampled_from(["", "", "", "hm"])) if odd else ""
        turns.append(Message("assistant", draw(WORDS), reasoning=thought, train=draw(st.integers(0, 5)) > 0))
    return Row(Origin("rows.jsonl", 1), tuple(turns))


def long_talk(exchanges: int) -> Row:
    """Questions and answers by turns, and nothing else."""
    asked = [f"What is {n}?" for n in range(exchanges)]
    turns = [(Message("user", q, instruction=q, input=""), Message("assistant", f"That is {q[8:-1]}.")) for q in asked]
    return Row(Origin("rows.jsonl", 1), tuple(chain.from_iterable(turns)))


Made = tuple[list[int], list[bool], list[Reject]]


def encoded(row: Row, template: Template, encoder: ChatTokenizer, train_on: TrainOn, *, plain: bool) -> Made:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers, "_EXACT", 1 << 30 if plain else 1)
        patch.setattr(answers, "_TURNS", 2)
        patch.setattr(borders, "_WHOLE", 1)
        patch.setattr(borders, "_spot", lambda number: False)  # what is not checked is right without it
        if plain:
            patch.setattr(borders, "_seam", lambda *_, **__: None)
        examples, rejects = encode_rows([row], template, encoder, train_on=train_on)
    return examples.tokens.tolist(), examples.trained.tolist(), rejects


def both_ways(row: Row, template: Template, encoder: ChatTokenizer, train_on: TrainOn) -> None:
    short, plain = (encoded(row, template, encoder, train_on, plain=way) for way in (False, True))
    assert short == plain


trained_on = st.sampled_from(["assistant", "assistant", "last", "all"])


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=10, deadline=None)
@given(row=talks(), train_on=trained_on)
@example(row=long_talk(9), train_on="assistant")
def test_a_family_s_own_template_gives_the_same_tokens_both_ways(name: str, row: Row, train_on: TrainOn) -> None:
    both_ways(row, *family(name), train_on)


@pytest.mark.parametrize("name", BUILT_IN)
@settings(max_examples=6, deadline=None)
@given(row=talks(), train_on=trained_on)
@example(row=long_talk(9), train_on="assistant")
def test_a_named_template_gives_the_same_tokens_both_ways(name: str, row: Row, train_on: TrainOn) -> None:
    both_ways(row, Template(name, BUILT_IN[name]), tokenizer("gpt2", needed_tokens(name)), train_on)


@pytest.mark.parametrize("name", ["gpt2", "mistral", "tinyllama", "stories260K", "phi2", "minimind"])
@settings(max_examples=6, deadline=None)
@given(row=talks(), train_on=trained_on)
@example(row=long_talk(9), train_on="assistant")
def test_each_tokenizer_gives_the_same_tokens_both_ways(name: str, row: Row, train_on: TrainOn) -> None:
    for template in ("plain", "alpaca"):
        both_ways(row, Template(template, BUILT_IN[template]), tokenizer(name), train_on)


@pytest.mark.parametrize("name", AROUND)
@settings(max_examples=10, deadline=None)
@given(row=talks(), train_on=trained_on)
@example(row=long_talk(9), train_on="assistant")
def test_a_template_that_looks_around_is_taken_or_refused_the_same_both_ways(
    name: str, row: Row, train_on: TrainOn
) -> None:
    both_ways(row, Template("made", AROUND[name]), tokenizer("minimind"), train_on)


class Pairs:
    """Two characters a token, wherever they stand: behind a stop, this one does not begin anew."""

    def __init__(self, *, by_words: bool) -> None:
        self.by_words = by_words  # a lie, where it says so

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[sum(map(ord, text[i : i + 2])) for i in range(0, len(text), 2)] for text in texts]


@given(pieces=st.lists(st.text("ab", max_size=3), min_size=4, max_size=9), by_words=st.booleans())
def test_a_tokenizer_that_does_not_begin_anew_behind_a_stop_is_noticed(pieces: list[str], by_words: bool) -> None:
    text = "".join(piece + "|" for piece in pieces)
    ends = [end for end, character in enumerate(text, 1) if character == "|"]
    spans = list(pairwise([0, *ends]))[1:]
    found = []
    for plain in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(borders, "_WHOLE", 1)
            if plain:
                patch.setattr(borders, "_seam", lambda *_, **__: None)
            found.append(borders.tokenise([(text, spans)], cast(TextEncoder, Pairs(by_words=by_words)), ("|",)))
    assert found[0] == found[1]


BY_WORDS = dict.fromkeys(("gpt2", "minimind", "phi2", "qwen", "o200k"), True)
BY_WORDS |= dict.fromkeys(("mistral", "tinyllama", "stories260K"), False)
JOINING = st.text("as#:'/. \n\né", max_size=8)  # which are often one word across a border
ANY_TEXT = st.text(
    st.sampled_from("ab1 \n\r\t.#'s_\u00a0\u3000\u0301é日😀\u200d|") | st.characters(codec="utf-8"), max_size=40
)
Pieces = list[tuple[str, bool]]  # of a text, and whether it is trained


@pytest.mark.parametrize("name", BY_WORDS)
@settings(max_examples=250, deadline=None)
@given(pieces=st.lists(st.tuples(JOINING | ANY_TEXT, st.booleans()), min_size=2, max_size=6), stops=st.booleans())
@example(pieces=[("Q\n###:\n", False), ("A", True), ("\nQ\n", False), (" B", True)], stops=False)
@example(pieces=[("x\n\u0301", False), ("\u0301\n's", True), ("y", False)], stops=False)
@example(pieces=[("Ok.\n/", False), ("'s fine", True)], stops=False)
@example(pieces=[("###'s :\na\n", False), ("\n", True), ("é\né", True)], stops=False)
@example(
    pieces=[("a\n\n", False), ("isis\nx", True), ("    th", False), ("eba\n\na\n\n Q:123thebathe\n", True)],
    stops=False,
)
def test_any_text_with_borders_anywhere_gives_the_same_tokens_both_ways(name: str, pieces: Pieces, stops: bool) -> None:
    encoder = tokenizer(name)
    assert encoder.by_words is BY_WORDS[name]
    if stops or not encoder.by_words:  # each piece but the first ends in one
        pieces = [pieces[0], *((piece + encoder.eos_token, trained) for piece, trained in pieces[1:])]
    text, ends = "".join(piece for piece, _ in pieces), list(accumulate((len(piece) for piece, _ in pieces), initial=0))
    spans = [(a, b) for (a, b), (_, trained) in zip(pairwise(ends), pieces, strict=True) if a < b and trained]
    found = []
    for plain in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(borders, "_WHOLE", 1)
            patch.setattr(borders, "_spot", lambda number: False)
            if plain:
                patch.setattr(borders, "_seam", lambda *_, **__: None)
            found.append(borders.tokenise([(text, spans)], encoder, (encoder.eos_token,)))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("added", "by_words"),
    [(" tool", True), ("\n\n", True), ("\nA: good", False), ("a<|endoftext|>b", False)],
)
def test_an_added_token_that_reaches_over_a_border_is_noticed(added: str, by_words: bool) -> None:
    encoder = ChatTokenizer(tokenizer("gpt2").hf.__class__.from_pretrained(str(MODELS / "tokenizers" / "gpt2")))
    encoder.add([added])
    assert encoder.by_words is by_words


class LooksBack:
    """A token for each character, and another one where the third before it is a mark: it says what is not so."""

    by_words = True

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[ord(c) + 1000 * (i > 2 and text[i - 3] == "!") for i, c in enumerate(text)] for text in texts]


def test_where_a_checked_text_shows_that_parts_are_not_the_whole_none_of_its_batch_is_parted() -> None:
    text, encoder = "!\nde", LooksBack()
    one, other = borders.tokenise([(text, [(3, 4)])] * 2, cast(TextEncoder, encoder), ())
    assert one == other
    assert one.tokens == encoder.encode([text])[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(borders, "_spot", lambda number: False)
        unchecked = borders.tokenise([(text, [(3, 4)])], cast(TextEncoder, encoder), ())
    assert unchecked != [one]  # so the check was what told


def test_the_work_goes_with_the_turns_and_not_with_their_square(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = tokenizer("minimind")
    done: list[int] = []

    def characters(exchanges: int) -> int:
        done.clear()
        examples, rejects = encode_rows(
            [long_talk(exchanges)], Template("chatml", CHATML), encoder, train_on="assistant"
        )
        assert (len(examples), rejects) == (1, [])
        return sum(done)

    def counting_render(*args: object, **options: object) -> str:
        text = ChatTokenizer.render(encoder, *args, **options)  # type: ignore[arg-type]
        done.append(len(text))
        return text

    def counting_encode(texts: Sequence[str]) -> list[list[int]]:
        done.extend(map(len, texts))
        return ChatTokenizer.encode(encoder, texts)

    monkeypatch.setattr(encoder, "render", counting_render)
    monkeypatch.setattr(encoder, "encode", counting_encode)
    few, many = characters(50), characters(400)
    assert many < 8 * 2 * few  # eight times the turns; by the square it is 64 times the work


def test_a_text_is_searched_from_where_the_last_part_was_found() -> None:
    text = Text("one two one three")
    assert [text.says(part) for part in ("one", "three", "two", "thr ee", "four", "")] == [True] * 4 + [False, True]
    said = functools.partial(left_out, text=Text("a b a"))
    assert [said(Message("user", part)) for part in ("b", "a", "c", "a b")] == ["", "", "its text", ""]
