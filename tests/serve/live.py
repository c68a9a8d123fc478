"""A server of tiny models in a thread, on a free port of this machine; what it is compared with."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import torch

from families import perturb
from serving import generated
from truetune.adapters import files
from truetune.adapters.inject import attach
from truetune.config.adapter import AdapterConfig
from truetune.config.resolve import resolve
from truetune.config.serve import ServeConfig
from truetune.data.template import Template
from truetune.models.load import load_model
from truetune.models.tokenizer import ChatTokenizer
from truetune.serve.app import application
from truetune.serve.command import service_of, with_token
from truetune.serve.limits import Door
from truetune.serve.listen import Server, bind
from truetune.serve.service import Service
from truetune.train.log import Screen

OTHER = "{%- for m in messages -%}[{{ m.role }}] {{ m.content }}{%- endfor -%}[me] "
"""A template that no tokenizer here has."""


def make_adapter(model: Path, folder: Path, method: AdapterConfig, *, seed: int, template: str | None = None) -> Path:
    """An adapter that changes the model's answers, with a card that names its template."""
    net = load_model(str(model), dtype=torch.float32)
    attach(net, method, seed=seed, in_float32=False)
    for _ in range(5):  # far enough that each answers otherwise
        perturb(net, seed=seed)
    card: dict[str, Any] = {}
    if template is not None:
        card["template"] = {"name": "own", "source": template, "sha256": Template("own", template).digest}
    files.save(net, folder, base=None, card=card)
    return folder


@dataclass
class Live:
    """A server that runs."""

    url: str
    service: Service
    server: Server
    key: str | None

    @property
    def client(self) -> openai.OpenAI:
        """OpenAI's own; it asks once."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key or "none", max_retries=0, timeout=30)

    def ask(
        self, path: str, body: object = None, *, headers: Mapping[str, str] | None = None, method: str | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """``(status, headers, body)`` of one request; bytes are sent as they are, anything else as JSON."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        key = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        given = {"Content-Type": "application/json", **key, **(headers or {})}
        request = urllib.request.Request(f"{self.url}{path}", data=data, headers=given, method=method)
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return response.status, dict(response.headers), response.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, dict(error.headers), error.read()

    def refused(self, path: str, body: object = None, **how: Any) -> tuple[int, dict[str, Any]]:
        """``(status, error)``, where the body has to be OpenAI's form and nothing else."""
        status, _, text = self.ask(path, body, **how)
        found = json.loads(text)
        assert set(found) == {"error"}
        assert set(found["error"]) == {"message", "type", "param", "code"}
        return status, found["error"]

    def settle(self) -> None:
        """Wait until it is idle: a client has its answer a moment before the server has put everything away."""
        wait_until(self.is_idle)

    def is_idle(self) -> bool:
        """Whether no answer is made, waits, or holds memory."""
        stats = self.service.engine.stats()
        return (self.service.gate.taken, stats["running"], stats["waiting"], stats["kv_tokens"]) == (0, 0, 0, 0)


@contextlib.contextmanager
def serving(**settings: Any) -> Iterator[Live]:
    """Serve with these settings, as the command does."""
    config = with_token(resolve(ServeConfig, file=None, flags={"port": 0, **settings}).config)
    service = service_of(config, Screen())
    with bind(config.host, config.port) as listening:
        app = application(service, Door(config.token, local_only=config.token is None))
        server = Server(app, service.gate, drain=config.drain, most=config.max_connections, seconds=config.max_stall)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])))
        listening.listen()
        service.engine.start()
        thread.start()
        live = Live(f"http://127.0.0.1:{listening.getsockname()[1]}", service, server, config.token)
        try:
            yield live
        finally:
            server.should_exit = True
            thread.join()
            service.engine.stop(drain=False)
            service.workers.shutdown()


def greedy(model: Path, adapter: Path | None, prompt: str, count: int) -> str:
    """What transformers answers alone, special tokens left out."""
    net, tokenizer = load_model(str(model), dtype=torch.float32), ChatTokenizer.load(str(model))
    if adapter is not None:
        files.load(net, files.read(adapter))
    (ids,) = tokenizer.encode([prompt])
    new = generated(net.eval(), ids, count)
    end = next((i for i, token in enumerate(new) if token in tokenizer.stop_ids), count)
    return str(tokenizer.hf.decode(new[:end], skip_special_tokens=True))


def wait_until(is_so: Callable[[], bool], seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < until, "it did not come to that"
        time.sleep(0.02)
