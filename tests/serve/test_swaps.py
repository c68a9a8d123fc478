"""An adapter that is replaced while it is asked: every answer is the old one's or the new one's, and of no third."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from serve.live import OTHER, greedy, make_adapter
from truetune.config.lora import LoRA
from truetune.errors import AdapterError
from truetune.generate.request import Request
from truetune.generate.shelf import AdapterChangedError, stamp_of
from truetune.serve.wording import Job

CHAT = "/v1/chat/completions"
ASKED = {"model": "own", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "temperature": 0}
WORDED = ["<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "[user] hi[me] "]


@pytest.fixture(scope="module")
def two(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters with a template each."""
    folder = tmp_path_factory.mktemp("two")
    return [
        make_adapter(tiny_model, folder / "first", LoRA(rank=2, alpha=8), seed=1),
        make_adapter(tiny_model, folder / "second", LoRA(rank=4, alpha=8), seed=2, template=OTHER),
    ]


def point(link: Path, target: Path) -> None:
    """In one move, as a careful deployment does it."""
    fresh = link.with_name(".fresh")
    fresh.symlink_to(target)
    os.replace(fresh, link)


def test_every_answer_is_of_one_adapter(
    start: Callable[..., Any], tiny_model: Path, two: list[Path], tmp_path: Path
) -> None:
    whole = [greedy(tiny_model, adapter, prompt, 8) for adapter, prompt in zip(two, WORDED, strict=True)]
    mixed = [greedy(tiny_model, adapter, prompt, 8) for adapter, prompt in zip(two, reversed(WORDED), strict=True)]
    assert len({*whole, *mixed}) == 4
    point(tmp_path / "own", two[0])
    over = threading.Event()

    def swap() -> None:
        number = 0
        while not over.wait(0.03):
            number += 1
            point(tmp_path / "own", two[number % 2])

    with start(model=str(tiny_model), served_name="base", adapters=(str(tmp_path),)) as live:
        swapping = threading.Thread(target=swap)
        swapping.start()
        try:
            with ThreadPoolExecutor(4) as pool:
                found = list(pool.map(lambda _: live.ask(CHAT, ASKED), range(80)))
        finally:
            over.set()
            swapping.join()
        answers = [json.loads(body)["choices"][0]["message"]["content"] for status, _, body in found if status == 200]
        assert set(answers) == set(whole)
        # Where it changed again and again while it was read, that is said.
        assert {status for status, _, _ in found} <= {200, 503}
        assert live.ask(CHAT, ASKED)[0] == 200
        live.settle()


@pytest.fixture
def linked(start: Callable[..., Any], tiny_model: Path, two: list[Path], tmp_path: Path) -> Iterator[tuple[Any, Path]]:
    """A server whose one adapter is a link to the first of the two, and the link."""
    link = tmp_path / "own"
    point(link, two[0])
    with start(model=str(tiny_model), served_name="base", adapters=(f"own={link}",)) as live:
        yield live, link


def test_a_request_that_was_worded_for_another_is_not_begun(linked: tuple[Any, Path], two: list[Path]) -> None:
    live, link = linked
    engine, stamp = live.service.engine, stamp_of(two[0])
    assert engine.submit(Request([1, 2], "own", stamp=stamp, max_new_tokens=2)).result().finish == "length"
    point(link, two[1])
    with pytest.raises(AdapterChangedError):
        engine.submit(Request([1, 2], "own", stamp=stamp))
    assert engine.submit(Request([1, 2], "own", max_new_tokens=2)).result().finish == "length"
    assert live.service.catalogue.get("own").stamp == stamp_of(two[1])


def test_a_prompt_is_worded_anew_where_the_adapter_changed_in_between(
    linked: tuple[Any, Path], tiny_model: Path, two: list[Path]
) -> None:
    live, link = linked
    tokenizer, seen = live.service.catalogue.base.speaker.tokenizer, list[str]()
    submit = live.service.engine.submit

    def between(request: Request, *more: Any) -> Any:
        seen.append(tokenizer.decode(list(request.prompt_ids)))
        point(link, two[1])
        return submit(request, *more)

    live.service.engine.submit = between  # type: ignore[method-assign]
    status, _, body = live.ask(CHAT, ASKED)
    assert (status, seen) == (200, WORDED)
    assert json.loads(body)["choices"][0]["message"]["content"] == greedy(tiny_model, two[1], WORDED[1], 8)
    assert json.loads(body)["usage"]["prompt_tokens"] == len(tokenizer.encode([WORDED[1]])[0])
    assert live.service.metrics.prompt_tokens["own"] == len(tokenizer.encode([WORDED[1]])[0])


def test_files_that_change_while_they_are_read_are_read_again(linked: tuple[Any, Path], two: list[Path]) -> None:
    """Settings of one adapter beside the weights of another would be neither."""
    live, link = linked
    over = threading.Event()

    def swap() -> None:
        number = 0
        while not over.is_set():
            number += 1
            point(link, two[number % 2])

    swapping = threading.Thread(target=swap)
    swapping.start()
    ranks = set()
    try:
        for _ in range(60):
            try:
                loaded = live.service.engine.adapters.get("own")
            except AdapterError as error:
                assert "written to while" in error.message  # noqa: PT017
                continue
            assert loaded.terms is not None
            (rank,) = {len(term.a) for term in loaded.terms.values() if term.a is not None}
            assert loaded.stamp == stamp_of(two[0] if rank == 2 else two[1])
            ranks.add(rank)
    finally:
        over.set()
        swapping.join()
    assert ranks


def test_jobs_name_the_adapter_they_are_worded_for(
    start: Callable[..., Any], tiny_model: Path, two: list[Path]
) -> None:
    from truetune.serve.protocol import CompletionRequest
    from truetune.serve.wording import of_completion

    with start(model=str(tiny_model), served_name="base", adapters=(f"own={two[0]}",)) as live:
        asked = CompletionRequest(model="own", prompt="a", n=2)
        job: Job = of_completion(asked, live.service.catalogue.get("own"), live.service.allowed)
        assert {request.stamp for request in job.requests} == {stamp_of(two[0])}
