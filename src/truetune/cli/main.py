"""``truetune COMMAND …``: from the shell to one recipe's ``run``."""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import json
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import truetune
from truetune.errors import StoppedError, TruetuneError, nearest


@dataclass(frozen=True)
class Command:
    """One command: where its settings and its recipe are, and a line about it."""

    config: str  # "module:Class"
    recipe: str  # module with run(resolved)
    about: str


COMMANDS: dict[str, Command] = {
    "demo": Command(
        "truetune.config.demo:DemoConfig", "truetune.recipes.demo", "the whole story, offline, in two minutes"
    ),
    "preview": Command(
        "truetune.config.preview:PreviewConfig", "truetune.recipes.preview", "see the data as the loss will see it"
    ),
    "sft": Command(
        "truetune.config.sft:SFTConfig", "truetune.recipes.sft", "fine-tune on instructions or conversations"
    ),
    "pretrain": Command("truetune.config.sft:PretrainConfig", "truetune.recipes.pretrain", "train on raw text"),
    "merge": Command("truetune.config.merge:MergeConfig", "truetune.recipes.merge", "fold an adapter into its base"),
    "quantize": Command(
        "truetune.config.quantize:QuantizeConfig", "truetune.recipes.quantize", "write a base in 4 or 8 bits"
    ),
    "export": Command(
        "truetune.config.export:ExportConfig", "truetune.recipes.export", "for vLLM, llama.cpp, Ollama, or the Hub"
    ),
    "generate": Command(
        "truetune.config.generate:GenerateConfig", "truetune.recipes.generate", "answer prompts, or a file of them"
    ),
    "chat": Command("truetune.config.chat:ChatConfig", "truetune.recipes.chat", "talk with a model in the terminal"),
    "serve": Command(
        "truetune.config.serve:ServeConfig", "truetune.serve.command", "an OpenAI-compatible server, many adapters"
    ),
    "verify": Command(
        "truetune.config.verify:VerifyConfig",
        "truetune.recipes.verify",
        "prove that what was trained is what is served",
    ),
    "import-config": Command(
        "truetune.config.import_config:ImportConfig",
        "truetune.recipes.import_config",
        "turn another program's config into one of ours",
    ),
    "inspect": Command(
        "truetune.config.inspect:InspectConfig", "truetune.recipes.inspect", "say what a file or folder is"
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Said before any library is imported that would phone home or spin up worker threads of its own.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # Threads that wait for each other by spinning starve on a shared processor: a step became ten times slower. A short
    # spin, then sleep, costs nothing that could be measured where nothing else runs.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a code page that lacks a letter must not end a run
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _dispatch(arguments)
        sys.stdout.flush()  # here, where a closed pipe can still be told from a fault
        return code
    except TruetuneError as error:
        # What was asked for is no error: the message says that it was done.
        print(error if isinstance(error, StoppedError) else f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped at once; nothing new was saved, and what was complete before is kept", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output has gone: leave as a program that SIGPIPE ends, and keep the interpreter's own last
        # flush from failing as well.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception:
        traceback.print_exc()
        print("error: this is a fault of truetune's, not yours; the lines above say where", file=sys.stderr)
        return 3


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"truetune {truetune.__version__}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        raise TruetuneError(
            f"there is no command '{name}'", ("did you mean", nearest(name, COMMANDS)), ("known", ", ".join(COMMANDS))
        )
    return _run(name, rest)


def _run(name: str, arguments: list[str]) -> int:
    from truetune.cli.flags import build_parser, parse
    from truetune.config.resolve import resolve

    command = COMMANDS[name]
    module, _, class_name = command.config.partition(":")
    config_class = getattr(importlib.import_module(module), class_name)
    if "-h" in arguments or "--help" in arguments:
        print(build_parser(name, config_class).format_help(), end="")
        return 0
    flags, file, as_json = parse(name, config_class, arguments)
    resolved = resolve(config_class, file=file, flags=flags)
    with _log_on_stderr():
        result = _recipe(command.recipe).run(resolved)
    if as_json:
        print(json.dumps(result, ensure_ascii=False, allow_nan=False, default=str))
    return int(result.get("exit_code", 0)) if isinstance(result, dict) else 0


def _recipe(module: str) -> ModuleType:
    """Import what a command runs. Thousands of modules are made to stay: collecting garbage meanwhile finds none, and
    takes a fifth of the time."""
    gc.disable()
    try:
        return importlib.import_module(module)
    finally:
        gc.freeze()
        gc.enable()


@contextlib.contextmanager
def _log_on_stderr() -> Iterator[None]:
    """Say what the library logs; in other programs it is silent unless they ask for it, as of any library."""
    import logging  # not for --help

    log, handler = logging.getLogger("truetune"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("truetune: %(message)s"))
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def overview() -> str:
    """The text of ``truetune --help``."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}   {command.about}" for name, command in COMMANDS.items()]
    return "\n".join(
        ["truetune: fine-tune with few parameters, and prove that what was trained is what is served.", "",
         "usage: truetune COMMAND [settings]", "", *lines, "", "truetune COMMAND --help lists a command's settings."]
    )  # fmt: skip
