"""OpenAI's own client gets what transformers says: whole and in pieces, from the base and from adapters."""

from __future__ import annotations

import base64
import json
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from serve.live import Live, greedy
from truetune.adapters import files
from truetune.adapters.virtual import virtual_ids
from truetune.models.load import load_model
from truetune.models.tokenizer import ChatTokenizer

COUNT = 10
NAMES = ["base", "red", "blue", "green"]
QUESTIONS = ["hi", "what is it?", "a b c d e f g", "¿Qué?"]


def worded(name: str, question: str) -> str:
    """The prompt, by the template each model was trained with."""
    if name == "blue":
        return f"[user] {question}[me] "
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def expected(tiny_model: Path, adapters_folder: Path) -> dict[tuple[str, str], str]:
    return {
        (name, question): greedy(
            tiny_model, None if name == "base" else adapters_folder / name, worded(name, question), COUNT
        )
        for name in NAMES
        for question in QUESTIONS
    }


def chat(live: Live, name: str, question: str, **settings: Any) -> Any:
    messages: Any = [{"role": "user", "content": question}]
    given = {"temperature": 0, "max_tokens": COUNT} | settings
    return live.client.chat.completions.create(model=name, messages=messages, **given)


def test_models_are_listed(live: Live) -> None:
    found = live.client.models.list().data
    assert [model.id for model in found] == ["base", "blue", "green", "red"]
    assert [model.owned_by for model in found] == ["truetune"] * 4


@pytest.mark.parametrize("name", NAMES)
def test_every_model_words_its_prompt_as_in_training_and_answers(
    live: Live, expected: dict[tuple[str, str], str], name: str
) -> None:
    found = chat(live, name, QUESTIONS[0])
    assert found.choices[0].message.content == expected[name, QUESTIONS[0]]
    assert (found.model, found.choices[0].finish_reason) == (name, "length")
    tokens = len(worded(name, QUESTIONS[0]).replace("<|im_start|>", "s").replace("<|im_end|>", "e"))
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (tokens, COUNT)


def test_the_models_differ(expected: dict[tuple[str, str], str]) -> None:
    """Else the tests around this one would not notice an adapter in another's place."""
    assert all(len({expected[name, question] for name in NAMES}) == len(NAMES) for question in QUESTIONS)


def test_sixteen_clients_at_once_hear_what_each_would_hear_alone(
    live: Live, expected: dict[tuple[str, str], str]
) -> None:
    def heard(number: int) -> tuple[tuple[str, str], str]:
        name, question = NAMES[number % 4], QUESTIONS[number // 4 % 4]
        stream = chat(live, name, question, stream=True, stream_options={"include_usage": True})
        events = list(stream)
        assert events[-1].usage.completion_tokens == COUNT
        assert {event.id for event in events} == {events[0].id}
        choices = [event.choices[0] for event in events[:-1]]
        assert [c.finish_reason for c in choices if c.finish_reason] == ["length"]
        return (name, question), "".join(choice.delta.content or "" for choice in choices)

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(heard, range(16)))
    assert dict(found) == expected
    live.settle()


def test_bare_text_is_continued(live: Live, tiny_model: Path) -> None:
    found = live.client.completions.create(
        model="base", prompt=["one", "two"], max_tokens=6, temperature=0, echo=True, n=2
    )
    one, two = (prompt + greedy(tiny_model, None, prompt, 6) for prompt in ("one", "two"))
    assert [choice.text for choice in found.choices] == [one, one, two, two]
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (6, 24)


def test_ids_are_a_prompt_too(live: Live, tiny_model: Path) -> None:
    (ids,) = ChatTokenizer.load(str(tiny_model)).encode(["one"])
    ask = live.client.completions.create
    texts = [ask(model="base", prompt=p, max_tokens=6, temperature=0).choices[0].text for p in ("one", ids, [ids])]
    assert texts == [greedy(tiny_model, None, "one", 6)] * 3


def test_a_seed_repeats_and_answers_of_one_request_differ(live: Live) -> None:
    def said(**settings: Any) -> list[str]:
        found = chat(live, "red", "hi", temperature=1.2, top_p=0.9, **settings)
        return [choice.message.content for choice in found.choices]

    first = said(seed=7, n=3)
    assert first == said(seed=7, n=3)
    assert len(set(first)) == 3
    assert said(seed=8) != first[:1]
    assert said() != said()


def test_a_streamed_answer_is_the_whole_one(live: Live) -> None:
    settings: dict[str, Any] = {"seed": 5, "temperature": 1.0, "n": 2, "logprobs": True, "top_logprobs": 2}
    whole, texts, entries = chat(live, "red", "hi", **settings), ["", ""], [[], []]  # type: ignore[var-annotated]
    for event in chat(live, "red", "hi", stream=True, **settings):
        choice = event.choices[0]
        texts[choice.index] += choice.delta.content or ""
        entries[choice.index] += choice.logprobs.content if choice.logprobs else []
    assert texts == [choice.message.content for choice in whole.choices]
    assert entries == [choice.logprobs.content for choice in whole.choices]


def test_stop_texts_end_an_answer(live: Live, expected: dict[tuple[str, str], str]) -> None:
    whole = expected["red", "hi"]
    stop = whole[4:6]
    for given in (stop, ["nowhere", stop]):
        found = chat(live, "red", "hi", stop=given).choices[0]
        assert (found.message.content, found.finish_reason) == (whole[: whole.index(stop)], "stop")


def test_penalties_and_the_additions_reach_the_engine(live: Live) -> None:
    def said(**settings: Any) -> str:
        return str(chat(live, "base", "hi", max_tokens=100, **settings).choices[0].message.content)

    plain = said()
    for name in ("frequency_penalty", "presence_penalty"):
        assert said(**{name: 2}) != plain
    assert said(extra_body={"repetition_penalty": 5.0}) != plain
    assert said(temperature=2, extra_body={"top_k": 1}) == plain
    assert said(temperature=2, extra_body={"min_p": 1.0}) == plain
    assert said(temperature=2, top_p=1e-6) == plain


def test_probabilities_are_the_models(live: Live, tiny_model: Path) -> None:
    found = chat(live, "base", "hi", max_tokens=1, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    tokenizer = ChatTokenizer.load(str(tiny_model))
    ids = torch.tensor(tokenizer.encode([worded("base", "hi")]))
    with torch.no_grad():
        scores = load_model(str(tiny_model), dtype=torch.float32)(input_ids=ids).logits[0, -1].log_softmax(-1)
    values, top = scores.topk(3)
    assert [entry.token for entry in found[0].top_logprobs] == [tokenizer.decode([int(i)]) for i in top]
    got = torch.tensor([entry.logprob for entry in found[0].top_logprobs])
    torch.testing.assert_close(got, values, atol=1e-5, rtol=0)
    older = live.client.completions.create(model="base", prompt="hi", max_tokens=3, temperature=0, logprobs=1)
    columns: Any = older.choices[0].logprobs
    assert [list(top) for top in columns.top_logprobs] == [[token] for token in columns.tokens]
    assert columns.text_offset == [sum(map(len, columns.tokens[:i])) for i in range(3)]


@pytest.mark.parametrize("name", NAMES)
def test_embeddings_are_means_of_the_last_hidden_states(
    live: Live, tiny_model: Path, adapters_folder: Path, name: str
) -> None:
    found = live.client.embeddings.create(model=name, input=["hello there", "x"])  # asks for base64
    plain = live.client.embeddings.create(model=name, input="x", encoding_format="float").data[0].embedding
    net = load_model(str(tiny_model), dtype=torch.float32)
    if name != "base":
        files.load(net, files.read(adapters_folder / name))
    (ids,) = ChatTokenizer.load(str(tiny_model)).encode(["x"])
    own = virtual_ids(net)
    with torch.no_grad():
        states = net.eval().base_model(input_ids=torch.tensor([[*own, *ids]])).last_hidden_state[0, len(own) :]
    for vector in (found.data[1].embedding, plain):
        torch.testing.assert_close(torch.tensor(vector), states.mean(0), atol=1e-5, rtol=1e-4)
    assert found.usage.prompt_tokens == len("hello there") + 1
    raw = json.loads(live.ask("/v1/embeddings", {"model": name, "input": "x", "encoding_format": "base64"})[2])
    assert struct.unpack("<32f", base64.b64decode(raw["data"][0]["embedding"])) == pytest.approx(plain, abs=1e-6)


def test_a_name_that_is_not_there_is_openais_not_found(live: Live) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model 'rde'; did you mean 'red'"):
        chat(live, "rde", "hi")
