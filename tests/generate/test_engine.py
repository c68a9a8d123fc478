"""Requests join, leave, fail and stop without a trace in each other; adapters come and go."""

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from families import FAMILIES
from serving import PROMPTS, answers, engine, generated, saved, with_adapter
from truetune.config.lora import LoRA
from truetune.errors import AdapterError, ConfigError
from truetune.generate.engine import Engine
from truetune.generate.request import Delta, Request, Sampling
from truetune.models.paged import PAGE

COUNT = 12


@pytest.fixture(scope="module")
def model() -> Any:
    return FAMILIES["llama"].make()


@pytest.fixture
def running(model: Any) -> Iterator[Engine]:
    server = engine(model)
    server.start()
    yield server
    server.stop(drain=False)


def test_a_thread_serves_requests_that_come_at_any_time(model: Any, running: Engine) -> None:
    expected = [generated(model, prompt, COUNT) for prompt in PROMPTS]
    found: dict[int, list[int]] = {}

    def ask(number: int) -> None:
        deltas = list(running.submit(Request(PROMPTS[number], max_new_tokens=COUNT)))
        found[number] = [i for delta in deltas for i in delta.ids]

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[n] for n in range(len(PROMPTS))] == expected


def test_pieces_come_one_by_one_and_the_last_one_says_why(model: Any) -> None:
    server, seen = engine(model), list[Delta]()
    server.submit(Request(PROMPTS[0], max_new_tokens=5), on_delta=seen.append)
    while server.step():
        pass
    assert [len(delta.ids) for delta in seen] == [1] * 5
    assert [delta.finish for delta in seen] == [None] * 4 + ["length"]
    assert "".join(delta.text for delta in seen) == bytes(generated(model, PROMPTS[0], 5)).decode()


def test_a_stop_token_ends_an_answer_and_is_no_text(model: Any) -> None:
    whole = generated(model, PROMPTS[0], COUNT)
    end = whole[4]
    first = whole.index(end)
    (found,) = answers(engine(model), [Request(PROMPTS[0], max_new_tokens=COUNT, stop_ids=frozenset([end]))])
    assert (list(found.ids), found.finish) == (whole[: first + 1], "stop")
    assert found.text == bytes(whole[:first]).decode()


def test_a_stop_text_ends_an_answer_across_tokens_and_is_never_shown(model: Any) -> None:
    whole = bytes(generated(model, PROMPTS[0], COUNT)).decode()
    stop = whole[4:7]
    at = whole.index(stop)
    server, seen = engine(model), list[Delta]()
    server.submit(Request(PROMPTS[0], max_new_tokens=COUNT, stop=["nowhere", stop]), on_delta=seen.append)
    while server.step():
        pass
    assert "".join(delta.text for delta in seen) == whole[:at]
    assert seen[-1].finish == "stop"


def test_draws_do_not_depend_on_the_batch(model: Any) -> None:
    drawn = Sampling(temperature=1.5, top_p=0.9, top_k=50, min_p=0.01, seed=3, repetition_penalty=1.2)
    request = Request(PROMPTS[2], max_new_tokens=COUNT, sampling=drawn)
    (alone,) = answers(engine(model), [request])
    others = [Request(p, max_new_tokens=COUNT, sampling=Sampling(temperature=2.0, seed=9)) for p in PROMPTS]
    among = answers(engine(model, step_tokens=4), [*others, request])
    assert among[-1].ids == alone.ids
    (other,) = answers(engine(model), [Request(PROMPTS[2], max_new_tokens=COUNT, sampling=Sampling(temperature=1.5))])
    assert other.ids != alone.ids


def test_logprobs_are_those_of_the_models_own_logits(model: Any) -> None:
    (found,) = answers(engine(model), [Request(PROMPTS[2], max_new_tokens=4, logprobs=3)])
    ids = [*PROMPTS[2], *found.ids]
    with torch.no_grad():
        scores = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    assert found.logprobs is not None
    for place, own in enumerate(found.logprobs, start=len(PROMPTS[2]) - 1):
        assert own.id == ids[place + 1]
        assert abs(own.logprob - float(scores[place, own.id])) < 1e-4  # float32 sums of 32 terms
        assert [i for i, _ in own.top] == scores[place].topk(3).indices.tolist()


def test_a_cancelled_answer_leaves_at_once(model: Any) -> None:
    server = engine(model)
    kept, gone = (server.submit(Request(PROMPTS[n], max_new_tokens=COUNT)) for n in (0, 2))
    for _ in range(4):
        server.step()
    gone.cancel()
    server.step()
    assert server.stats()["running"] == 1
    while server.step():
        pass
    assert gone.result().finish == "cancelled"
    assert list(kept.result().ids) == generated(model, PROMPTS[0], COUNT)
    assert server.stats()["kv_tokens"] == 0


def test_a_request_that_fails_takes_no_other_with_it(model: Any) -> None:
    """A listener that raises, and logits that are no numbers for one row alone."""
    server = engine(model)
    kept = server.submit(Request(PROMPTS[2], max_new_tokens=COUNT))

    def bad(delta: Delta) -> None:
        raise RuntimeError("the listener broke")

    server.submit(Request(PROMPTS[0], max_new_tokens=COUNT), on_delta=bad)
    table = model.get_input_embeddings().weight
    before = table[100].clone()
    try:
        table.data[100] = float("nan")
        broken = server.submit(Request([100, 1], max_new_tokens=COUNT))
        while server.step():
            pass
    finally:
        table.data[100] = before
    end = broken.result()
    assert (end.finish, end.ids) == ("error", ())
    assert "not finite" in str(end.error)
    assert list(kept.result().ids) == generated(model, PROMPTS[2], COUNT)


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (Request([]), "the prompt is empty"),
        (Request([1, 999]), "the prompt has the id 999"),
        (Request([1, 0, -1]), "the prompt has the id -1"),
        (Request([1], max_new_tokens=0), "max_new_tokens: found 0"),
        (Request([1] * 64), "the model's context is 64"),
        (Request([1], adapter="nobody"), "there is no adapter 'nobody'"),
    ],
)
def test_what_can_not_be_answered_is_refused(model: Any, request_: Request, said: str) -> None:
    with pytest.raises((ConfigError, AdapterError), match=said):
        engine(model).submit(request_)


def test_an_answer_ends_where_the_context_does(model: Any) -> None:
    (found,) = answers(engine(model), [Request([1] * 60, max_new_tokens=50)])
    assert (len(found.ids), found.finish) == (4, "length")


def test_sampling_out_of_range_is_refused() -> None:
    for wrong in ({"temperature": -1.0}, {"top_p": 0.0}, {"min_p": 2.0}, {"top_k": -1}, {"repetition_penalty": 0.0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Sampling(**wrong)  # type: ignore[arg-type]


def test_stopping_drains_or_cancels(model: Any) -> None:
    server = engine(model)
    server.start()
    handle = server.submit(Request(PROMPTS[0], max_new_tokens=COUNT))
    server.stop(drain=True)
    assert handle.result().finish == "length"
    handle = server.submit(Request(PROMPTS[0], max_new_tokens=60))
    server.stop(drain=False)  # nothing was computed yet
    assert handle.result().finish == "cancelled"


def test_an_adapters_folder_is_read_again_when_it_changes(model: Any, tmp_path: Path) -> None:
    folders = [saved(model, LoRA(rank=2, alpha=8), tmp_path / str(seed), seed=seed) for seed in (1, 2)]
    expected = [with_adapter(model, folder, PROMPTS[:1], COUNT)[0] for folder in folders]
    live = tmp_path / "live"
    shutil.copytree(folders[0], live)
    server = engine(model)
    server.adapters.register("own", live)
    ask = Request(PROMPTS[0], adapter="own", max_new_tokens=COUNT)
    assert list(answers(server, [ask])[0].ids) == expected[0]
    for file in folders[1].iterdir():
        shutil.copy(file, live / file.name)
        os.utime(live / file.name, ns=(time.time_ns(), time.time_ns() + 10))
    assert list(answers(server, [ask])[0].ids) == expected[1]
    (live / "adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(AdapterError, match="can't be read"):
        server.submit(ask)
    assert list(answers(server, [Request(PROMPTS[0], max_new_tokens=COUNT)])[0].ids) == generated(
        model, PROMPTS[0], COUNT
    )


def test_adapters_beyond_the_budget_are_put_away_and_come_back(model: Any, tmp_path: Path) -> None:
    folders = [saved(model, LoRA(rank=2, alpha=8), tmp_path / str(seed), seed=seed) for seed in (1, 2, 3)]
    expected = [with_adapter(model, folder, PROMPTS[:1], COUNT)[0] for folder in folders]
    size = engine(model).adapters.register("x", folders[0]).nbytes
    server = engine(model, adapter_memory=2 * size)
    for n, folder in enumerate(folders):
        server.adapters.register(f"a{n}", folder)
    assert server.adapters.loaded() == ["a1", "a2"]
    assert server.adapters.names() == ["a0", "a1", "a2"]
    found = answers(server, [Request(PROMPTS[0], adapter=f"a{n}", max_new_tokens=COUNT) for n in (0, 1, 2, 0)])
    assert [list(delta.ids) for delta in found] == [expected[n] for n in (0, 1, 2, 0)]
    assert server.stats()["adapters_bytes"] <= 2 * size
    server.adapters.unregister("a1")
    with pytest.raises(AdapterError, match="there is no adapter 'a1'"):
        server.submit(Request(PROMPTS[0], adapter="a1"))


def test_a_broken_adapter_is_refused_and_the_model_stays_as_it_was(model: Any, tmp_path: Path) -> None:
    folder = saved(model, LoRA(rank=2, alpha=8), tmp_path / "adapter")
    server = engine(model)
    other = FAMILIES["llama"].make(hidden_size=16)
    with pytest.raises(AdapterError, match="does not fit this model"):
        server.adapters.register("own", saved(other, LoRA(rank=2, alpha=8), tmp_path / "other"))
    (folder / "adapter_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(AdapterError, match="can't be read as JSON"):
        server.adapters.register("own", folder)
    with pytest.raises(AdapterError, match="is no adapter"):
        server.adapters.register("own", tmp_path)
    assert server.adapters.names() == []
    assert list(answers(server, [Request(PROMPTS[0], max_new_tokens=5)])[0].ids) == generated(model, PROMPTS[0], 5)


def test_pages_are_counted(model: Any) -> None:
    server = engine(model, step_tokens=64)
    server.submit(Request(PROMPTS[2], max_new_tokens=COUNT))
    server.step()
    assert server.stats()["kv_tokens"] == 2 * PAGE
    assert server.stats()["kv_capacity"] == 256


def test_an_adapter_in_memory_outlives_its_file(model: Any, tmp_path: Path) -> None:
    """A file that is cut short under a process that has it mapped ends that process: so none is."""
    folder = saved(model, LoRA(rank=2, alpha=8), tmp_path / "adapter")
    code = (
        "import os, sys, pathlib\nfrom truetune.adapters import files\n"
        "folder = pathlib.Path(sys.argv[1])\nfile = files.read(folder, mapped=False)\n"
        "os.truncate(folder / files.WEIGHTS, 0)\nprint(sum(float(t.abs().sum()) for t in file.tensors.values()) > 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "True\n")
