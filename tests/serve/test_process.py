"""The command as people run it: what it prints, the examples of the documentation, and how it stops."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from serve.live import Live
from truetune.cli.main import main

DOCS = Path(__file__).resolve().parents[2] / "docs" / "serving.md"
EXAMPLES = re.findall(r"^curl .*?(?=\n\n|\n```)", DOCS.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@contextmanager
def process(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command, and the address it prints."""
    command = [sys.executable, "-m", "truetune", "serve", "--port", "0", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as running:
        try:
            assert running.stderr is not None
            lines = []
            for line in running.stderr:
                lines.append(line)
                if found := re.search(r"http://\S+(?=/v1)", line):
                    yield running, found[0]
                    break
            else:
                raise AssertionError("".join(lines))
        finally:
            running.kill()


def test_there_are_examples() -> None:
    assert len(EXAMPLES) == 7


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("number", range(7))
def test_the_examples_of_the_documentation_work(live: Live, number: int) -> None:
    example = EXAMPLES[number].replace("http://127.0.0.1:8000", live.url).replace('"support"', '"red"')
    done = subprocess.run(["sh", "-c", f"{example} --silent --fail-with-body"], capture_output=True, check=False)
    assert done.returncode == 0, done.stdout
    if "stream" in example:
        assert done.stdout.rstrip().endswith(b"data: [DONE]")
    elif "metrics" not in example:
        assert "error" not in json.loads(done.stdout)


def test_the_figures_add_up(live: Live) -> None:
    def figures() -> dict[str, float]:
        lines = live.ask("/metrics")[2].decode().splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}

    def difference(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    before = figures()
    messages: Any = [{"role": "user", "content": "hi"}]
    used = live.client.chat.completions.create(model="blue", messages=messages, max_tokens=7, temperature=0).usage
    assert live.refused("/v1/chat/completions", {})[0] == 400
    after = figures()
    assert used is not None
    assert difference('truetune_requests_total{route="/v1/chat/completions",code="200"}') == 1
    assert difference('truetune_requests_total{route="/v1/chat/completions",code="400"}') == 1
    assert difference('truetune_answer_tokens_total{model="blue"}') == used.completion_tokens
    assert difference('truetune_prompt_tokens_total{model="blue"}') == used.prompt_tokens
    assert difference('truetune_answer_seconds_bucket{le="+Inf"}') == difference("truetune_answer_seconds_count") == 1


def test_a_signal_lets_running_answers_end_and_refuses_new_ones(tiny_model: Path, adapters_folder: Path) -> None:
    with process("--model", str(tiny_model), "--adapters", str(adapters_folder), "--json") as (running, url):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30)
        messages: Any = [{"role": "user", "content": "hi"}]
        name = client.models.list().data[0].id
        stream = client.chat.completions.create(
            model=name, messages=messages, max_tokens=230, stream=True, logprobs=True, top_logprobs=20, n=16,
            temperature=1.5, seed=1,
        )  # fmt: skip
        next(iter(stream))
        running.send_signal(signal.SIGTERM)
        codes: list[int] = []

        def ask_again() -> None:
            while 503 not in codes:
                try:
                    client.chat.completions.create(model=name, messages=messages, max_tokens=1)
                except openai.APIStatusError as error:
                    codes.append(error.status_code)
                except openai.APIConnectionError:
                    return

        asking = threading.Thread(target=ask_again)
        asking.start()
        reasons = [c.finish_reason for event in stream for c in event.choices if c.finish_reason]
        asking.join()
        assert len(reasons) == 16
        assert codes == [503]
        out, err = running.communicate(timeout=20)
        assert running.returncode == 143
        last = json.loads(out.splitlines()[-1])
        assert (last["exit_code"], last["answered"]) == (143, 2)
        assert "Traceback" not in err


def test_ctrl_c_ends_an_idle_server(tiny_model: Path) -> None:
    with process("--model", str(tiny_model)) as (running, url):
        with urllib.request.urlopen(f"{url}/health") as response:
            assert json.loads(response.read()) == {"status": "ok"}
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=20)
        assert running.returncode == 130
        assert "1 request answered" in err
        assert "Traceback" not in err


def test_a_port_that_is_taken_is_said_before_anything_is_loaded(live: Live, capsys: pytest.CaptureFixture[str]) -> None:
    port = live.url.rpartition(":")[2]
    assert main(["serve", "--model", "nowhere", "--port", port]) == 2
    assert f"--port {port}: Address already in use" in capsys.readouterr().err
