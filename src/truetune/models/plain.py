"""Models as their other users load them: by transformers alone, or with PEFT, and nothing of ours in between."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from truetune.errors import ConfigError, ModelError
from truetune.models.library import explained, quiet
from truetune.models.load import skeleton


def load_plain(folder: Path, *, device: str) -> tuple[Any, list[str]]:
    """``AutoModelForCausalLM.from_pretrained``, in the dtype that is stored.

    Returns:
        The model in ``eval`` mode, and what the library reports and goes on without: ``missing lm_head.weight``, ….
    Raises:
        ModelError: it does not load.
    """
    # One of its warnings is said at each product in a dtype that it casts, which is every product of a bf16 model.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with explained(str(folder)), quiet():
        model, info = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype="auto", local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
    kinds = ("missing", "unexpected", "mismatched")
    faults = [f"{kind} {key}" for kind in kinds for key in sorted(map(str, info.get(f"{kind}_keys", ())))]
    return model.to(device).eval(), faults


def check_peft() -> None:
    """Raises ConfigError where PEFT is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise ConfigError("--against peft: PEFT is not installed here", ("way out", "pip install peft"))


def load_by_peft(base: Path, adapter: Path, *, dtype: torch.dtype, device: str, tokens: int | None = None) -> Any:
    """``PeftModel.from_pretrained`` on the base, in ``eval`` mode; its logits are those of the given tokens alone.

    Args:
        tokens: rows that the embedding table has to have; None for those it has.
    Raises:
        ConfigError: PEFT is not installed.
        ModelError: the base or the adapter does not load.
    """
    check_peft()
    peft = importlib.import_module("peft")  # for this comparison alone: nothing of the product depends on it
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its advice is for who trains with it
        with explained(str(base)):
            model = AutoModelForCausalLM.from_pretrained(str(base), dtype=dtype, local_files_only=True)
        if tokens is not None:
            model.resize_token_embeddings(tokens, mean_resizing=False)
        try:
            model = peft.PeftModel.from_pretrained(model, str(adapter)).to(device).eval()
        except Exception as error:  # of a library that is not ours, about a file that it may not know
            said = " ".join(str(error).split())[:200]
            raise ModelError(f"PEFT does not load {adapter}", ("because", f"{type(error).__name__}: {said}")) from None
    model.register_forward_hook(_of_the_tokens, with_kwargs=True)
    return model


def _of_the_tokens(_: Any, args: tuple[Any, ...], given: Mapping[str, Any], output: Any) -> Any:
    """PEFT answers for its virtual tokens in front as well, where these are embeddings."""
    ids = given["input_ids"] if "input_ids" in given else args[0]
    output["logits"] = output.logits[:, -ids.shape[1] :]
    return output


def of_weights(config: Any, state: Mapping[str, Tensor], *, device: str) -> Any:
    """The model of a config with these weights, float32, in ``eval`` mode.

    Args:
        state: by the model's own names; of a tied head only the table.
    """
    # Gemma 2's cap on attention scores is computed by this one everywhere.
    attention = "eager" if getattr(config, "attn_logit_softcapping", None) else None
    cls = type(skeleton(config, dtype=torch.float32))
    with quiet():
        model, info = cls.from_pretrained(
            None, config=config, state_dict=dict(state), dtype=torch.float32, output_loading_info=True,
            attn_implementation=attention,
        )  # fmt: skip
    assert not info["missing_keys"], info["missing_keys"]
    return model.to(device).eval()


def own_stops(model: Any) -> frozenset[int]:
    """The tokens that end an answer when nobody names any: those of the model's generation settings."""
    stops = getattr(model.generation_config, "eos_token_id", None)
    return frozenset(stops if isinstance(stops, list) else [] if stops is None else [stops])
