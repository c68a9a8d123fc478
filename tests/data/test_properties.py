"""What must hold of any rows: every one is accounted for, and what is trained is the answers with their stop tokens."""

import json
import tempfile
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import CHATML, SHARED
from truetune.config.sft import SFTConfig
from truetune.data.length import limit_lengths, truncation
from truetune.data.mask import TrainOn, encode_rows
from truetune.data.schema import Message, Origin, Row
from truetune.data.template import Template
from truetune.data.token_set import TokenSet
from truetune.models.tokenizer import ChatTokenizer
from truetune.recipes.data import prepare_sft
from truetune.train.log import Screen

CHATS = Template("chatml", CHATML)
STOP = "<|im_end|>"
# Any text at all, but for what a tokenizer takes for a special token.
TEXTS = st.text(max_size=40).filter(lambda text: "<|" not in text)
MINIMIND = SHARED / "models" / "tokenizers" / "minimind"
NEEDS_SHARED = pytest.mark.skipif(not MINIMIND.is_dir(), reason=f"the real tokenizers are not in {MINIMIND.parent}")


@cache
def load(folder: str) -> ChatTokenizer:
    from transformers import AutoTokenizer

    return ChatTokenizer(AutoTokenizer.from_pretrained(folder, local_files_only=True))


@st.composite
def conversations(draw: st.DrawFn) -> Row:
    """A system message perhaps, then questions and answers by turns, each answer to be learned or not."""
    turns = [Message("system", draw(TEXTS))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 4))):
        turns += [Message("user", draw(TEXTS)), Message("assistant", draw(TEXTS), train=draw(st.booleans()))]
    return Row(Origin("rows.jsonl", 1), tuple(turns))


def stretches(tokens: list[int], trained: list[bool]) -> list[tuple[int, list[int]]]:
    """Where each trained stretch begins, and its ids."""
    found = []
    for flag, run in groupby(range(len(tokens)), lambda i: trained[i]):
        if flag:
            places = list(run)
            found.append((places[0], [tokens[i] for i in places]))
    return found


def check(row: Row, tokenizer: ChatTokenizer, train_on: TrainOn, *, excused: set[str]) -> None:
    """The trained stretches are the wanted answers, each behind the prompt that would be served, each with its stop."""
    last = max(i for i, turn in enumerate(row.messages) if turn.role == "assistant")
    wanted = [
        i
        for i, turn in enumerate(row.messages)
        if turn.role == "assistant" and turn.train and (train_on == "assistant" or i == last)
    ]
    examples, rejects = encode_rows([row], CHATS, tokenizer, train_on=train_on)
    if rejects:
        assert rejects[0].reason in (excused if wanted else {"nothing_trained"})
        return
    tokens, trained = (column.tolist() for column in examples.example(0))
    found = stretches(tokens, trained)
    assert [tokenizer.decode(ids) for _, ids in found] == [row.messages[i].content + STOP for i in wanted]
    for (start, ids), index in zip(found, wanted, strict=True):
        prompt = CHATS.render(tokenizer, row.messages[:index], prompt=True)
        assert tokens[:start] == tokenizer.encode([prompt])[0]
        assert ids[-1] in tokenizer.stop_ids
        assert not tokenizer.stop_ids.intersection(ids[:-1])


@settings(max_examples=60, deadline=None)
@given(conversations(), st.sampled_from(["assistant", "last"]))
def test_the_answers_and_their_stops_are_trained_and_nothing_else(
    tiny_model: Path, row: Row, train_on: TrainOn
) -> None:
    check(row, load(str(tiny_model)), train_on, excused=set())


@NEEDS_SHARED
@settings(max_examples=60, deadline=None)
@given(conversations(), st.sampled_from(["assistant", "last"]))
def test_a_tokenizer_that_merges_trains_the_same_or_refuses_the_row(row: Row, train_on: TrainOn) -> None:
    check(row, load(str(MINIMIND)), train_on, excused={"prompt_differs"})


@settings(max_examples=60, deadline=None)
@given(TEXTS.filter(bool))
def test_a_text_is_trained_whole_and_comes_back_as_it_was(tiny_model: Path, text: str) -> None:
    tokenizer = load(str(tiny_model))
    assert tokenizer.decode(tokenizer.encode([text])[0]) == text
    examples, rejects = encode_rows([Row(Origin("x", 1), text=text)], None, tokenizer, train_on="assistant")
    assert rejects == []
    tokens, trained = examples.example(0)
    assert tokenizer.decode(tokens.tolist()) == text + tokenizer.eos_token
    assert all(trained.tolist())


def answer(content: object) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": content}]}


THINKING = answer("<think>hm</think>yes")
SYSTEM = {"messages": [{"role": "system", "content": "s"}, *answer("ok")["messages"]]}
LINES = st.one_of(
    TEXTS.map(lambda text: json.dumps(answer(text))),
    st.sampled_from([answer("x" * 300), answer(None), answer(5), THINKING, SYSTEM, {"messages": []}, {}, []]).map(
        json.dumps
    ),
    st.sampled_from(['{"messages": ', "\ud800", "null"]),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(LINES, min_size=1, max_size=12), st.sampled_from([0.0, 0.3]))
def test_every_line_is_used_or_rejected_with_its_reason(tiny_model: Path, lines: list[str], share: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        # Some rows for either side of the split; the surrogate is a line that is not UTF-8.
        lines += [json.dumps(answer(f"It is {number}.")) for number in range(12)]
        path.write_bytes("".join(line + "\n" for line in lines).encode(errors="surrogatepass"))
        config = SFTConfig(
            model=str(tiny_model), data=(str(path),), format="messages", on_overlong="drop", max_bad_rows=99,
            thinking="drop", system_messages="drop", val_split=share,
        )  # fmt: skip
        made = prepare_sft(config, load(str(tiny_model)), max_length=256, screen=Screen())
    report = made.report
    assert report["read"] == len(lines) == report["used"] + sum(report["rejected"].values())
    used = [origin.row for part in (made.train, made.held_out) if part for origin in part.origins]
    assert sorted([*used, *(reject.origin.row for reject in made.rejects)]) == list(range(1, len(lines) + 1))
    dropped = {"thinking": json.dumps(THINKING), "system_messages": json.dumps(SYSTEM)}
    assert report["dropped"] == {name: lines.count(line) for name, line in dropped.items()}


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=8),
    st.integers(4, 40),
    st.sampled_from(["drop", "truncate"]),
)
def test_no_row_is_over_the_limit_and_what_was_lost_is_counted(
    shapes: list[tuple[int, int]], most: int, policy: Any
) -> None:
    ids = [[2] * prompt + [3] * (reply - 1) + [9] for prompt, reply in shapes]  # 9 ends an answer
    flags = [[False] * prompt + [True] * reply for prompt, reply in shapes]
    before = TokenSet.from_lists(ids, flags, [Origin("x", number) for number in range(1, len(shapes) + 1)])
    said: list[str] = []
    after, rejects = limit_lengths(before, most, policy=policy, say=said.append, decode=str)
    long = [row for row in ids if len(row) > most]
    assert max([0, *after.lengths.tolist()]) <= most
    assert len(after) + len(rejects) == len(before)
    assert len(said) == bool(long)
    if policy == "truncate":
        ends = [after.example(i)[0][-1] for i in range(len(after))]
        assert truncation(before, after) == {
            "rows": len(long),
            "tokens": sum(len(row) - most for row in long),
            "without_stop": sum(int(end) != 9 for end in ends),
        }
