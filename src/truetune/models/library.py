"""The libraries that load a model, as they are heard: their exceptions in our words, their bars not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from truetune.errors import ModelError
from truetune.models.names import is_local, needs_code


@contextlib.contextmanager
def explained(name: str) -> Iterator[None]:
    """Turn the library's exceptions about a checkpoint into ours."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        # Beside Python's own, safetensors, tokenizers and the Hub's client raise exceptions for damaged files.
        room = type(error).__module__.split(".")[0]
        if room not in ("builtins", "safetensors", "safetensors_rust", "tokenizers", "huggingface_hub", "httpx"):
            raise
        raise _explain(name, " ".join(str(error).split())) from None


def _explain(name: str, text: str) -> ModelError:
    if "trust_remote_code" in text or "custom code" in text:
        return needs_code(name)
    if "deserializing header" in text:
        return ModelError(
            f"--model: a weight file in {name} is damaged or cut short",
            ("because", text[:200]),
            ("way out", "fetch the .safetensors files again; a full disk is a common cause"),
        )
    if is_local(name):
        return ModelError(f"--model: {name} can't be loaded", ("because", text[:400]))
    if "couldn't connect" in text or "offline mode" in text or "outgoing traffic" in text or "LocalEntry" in text:
        return ModelError(
            f"--model: there is no folder {name}, and the Hub can't be asked for it: no connection, or HF_HUB_OFFLINE",
            ("way out", "the path of a model on this machine, or a connection for the first download"),
        )
    if "valid model identifier" in text or "Repository Not Found" in text:
        return ModelError(
            f"--model: {name} is neither a folder here nor a model on the Hub",
            ("way out", "check the spelling; a private or gated model needs `hf auth login` first"),
        )
    return ModelError(f"--model: {name} can't be loaded from the Hub", ("because", text[:400]))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the library's bars and advice off the terminal; what matters is checked and said by us."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
