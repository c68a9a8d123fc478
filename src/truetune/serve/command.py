"""``truetune serve``: an OpenAI-compatible server, many adapters on one base."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from truetune.config.resolve import Resolved
from truetune.config.serve import NAME, ServeConfig
from truetune.errors import ConfigError, counted

try:
    import starlette  # noqa: F401 - one of the two that the extra brings
    import uvicorn  # noqa: F401
except ImportError:
    raise ConfigError(
        "truetune serve needs starlette and uvicorn, which are not installed",
        ("way out", "pip install 'truetune[serve]'"),
    ) from None

from truetune.generate.engine import Engine
from truetune.models.names import is_local
from truetune.serve.app import application
from truetune.serve.catalogue import Catalogue, Shelves, load_base
from truetune.serve.limits import Door, Gate
from truetune.serve.listen import Server, bind
from truetune.serve.service import Service
from truetune.serve.wording import Allowance
from truetune.train.log import Screen

TOKEN = "TRUETUNE_TOKEN"


def run(resolved: Resolved[ServeConfig]) -> dict[str, Any]:
    """Serve until a signal comes; returns what was counted."""
    config, screen = with_token(resolved.config), Screen()
    Shelves.of(config.adapters)  # what can't be is said before anything is loaded
    with bind(config.host, config.port) as listening:
        service = service_of(config, screen)
        listening.listen()  # from here on clients wait in line, and are not turned away
        port = listening.getsockname()[1]
        door = Door(config.token, local_only=config.token is None)
        server = Server(application(service, door), service.gate, drain=config.drain, most=config.max_connections,
                        seconds=config.max_stall)  # fmt: skip
        _say(service, port, screen)
        service.engine.start()
        try:
            server.run(sockets=[listening])
        finally:
            service.engine.stop(drain=False)
            service.workers.shutdown(wait=False, cancel_futures=True)
    metrics = service.metrics
    answered = sum(count for (_, status), count in metrics.requests.items() if status == 200)
    new = sum(metrics.answer_tokens.values())
    screen.say("done", f"{counted(answered, 'request')} answered · {counted(new, 'token')} written")
    stopped_by = server.signal
    return {"requests": sum(metrics.requests.values()), "answered": answered, "tokens": new,
            "exit_code": 0 if stopped_by is None else 128 + stopped_by}  # fmt: skip


def with_token(config: ServeConfig) -> ServeConfig:
    """The config with the token of the environment, where it has none.

    Raises:
        ConfigError: no token, and others could reach the server.
    """
    token = config.token or os.environ.get(TOKEN) or None
    if token is None and not config.is_loopback:
        raise ConfigError(
            f"--host {config.host} lets other machines in, and no token is set",
            ("way out", f"set {TOKEN} to a secret that clients send as their API key, or leave --host out"),
        )
    if token is not None and not (len(token) >= 8 and token.isascii() and token.isprintable() and " " not in token):
        raise ConfigError("the token has to be 8 or more letters, digits and signs, without a space")
    return config.model_copy(update={"token": token})


def service_of(config: ServeConfig, screen: Screen) -> Service:
    """Load all that is served.

    Raises:
        TruetuneError: the base, or an adapter that was named, can't be.
    """
    base = load_base(config, screen)
    engine = Engine(base.model, base.tokenizer, max_rows=config.max_rows, max_tokens=config.max_tokens,
                    adapter_memory=config.adapter_bytes)  # fmt: skip
    catalogue = Catalogue(config, base, name=config.served_name or _name_of(config.model), engine=engine, screen=screen)
    catalogue.load_all()
    gate, allowed = Gate(config.max_rows + config.max_queue), Allowance.of(config.max_new_tokens, engine)
    return Service(config, engine, catalogue, gate, allowed)


def _name_of(model: str) -> str:
    path = Path(model).expanduser().resolve() if is_local(model) else Path(model)
    return path.name if NAME.fullmatch(path.name) else "base"


def _say(service: Service, port: int, screen: Screen) -> None:
    config = service.config
    host = f"[{config.host}]" if ":" in config.host else config.host
    names = service.catalogue.names()
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    screen.say("models", shown)
    guarded = "clients need the API key" if config.token else "for this machine alone"
    screen.say("serve", f"http://{host}:{port}/v1 · {guarded} · Ctrl-C stops it")
