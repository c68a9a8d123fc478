"""Load a causal language model: a local folder without any network, or a name on the Hub."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from truetune.checkpoint.side_files import FETCHED, NOT_FETCHED
from truetune.config.quant import QuantRecipe
from truetune.errors import ConfigError, ModelError, counted
from truetune.models.context import context_length as context_length
from truetune.models.context import usable_length as usable_length
from truetune.models.library import explained, quiet
from truetune.models.names import check_config, only_local
from truetune.models.names import is_local as is_local
from truetune.models.names import model_folder as model_folder
from truetune.models.quantised import check_dense_files, load_quantised
from truetune.models.stored import READ, method_of, quantization_fields, stored_recipe
from truetune.models.stored import dense_config as dense_config
from truetune.models.weights import check_weights
from truetune.models.weights import fingerprint as fingerprint
from truetune.models.weights import weight_hash as weight_hash
from truetune.quant.replace import quantisable_stacks, replace
from truetune.quant.replace import stacks_remark as stacks_remark

if TYPE_CHECKING:  # three seconds of processor time; what only reads files does without
    from transformers import PreTrainedModel

# What loading and tokenising share; the library would ask on the terminal whether to run a model's code.
_NO_CODE = {"trust_remote_code": False}


def load_config(name: str, *, revision: str | None = None) -> Any:
    """The model's config alone; no weights are read.

    Raises:
        ModelError: not found, unreadable, of an unknown architecture, or no causal language model.
        ConfigError: a revision of a local folder.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    folder = name
    if is_local(name):
        folder = str(model_folder(name))
        if revision is not None:
            raise ConfigError("--revision is for models on the Hub, and --model is a folder here")
        check_config(Path(folder))
    with explained(name), quiet():
        config = AutoConfig.from_pretrained(folder, revision=revision, local_files_only=only_local(name), **_NO_CODE)
    if not is_local(name) and (snapshot := known_copy(name, revision=revision)):
        config._commit_hash = snapshot.name  # as older transformers do; a branch may have moved when it is asked again
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(
            f"--model: {name} is of the kind '{config.model_type}', which is no causal language model",
            ("expected", "a model that continues text, such as llama, qwen3, mistral or gpt2"),
        )
    return config


def check_readable(name: str, config: Any) -> QuantRecipe | None:
    """How a base's weights are stored quantised, by what its config says; None for dense ones.

    Raises:
        ModelError: in a form that is not bitsandbytes', naming it.
    """
    fields = quantization_fields(config)
    if not fields:
        return None
    if method_of(fields) in READ:
        return stored_recipe(config)
    raise ModelError(
        f"--model: the weights of {name} are quantised ({method_of(fields) or 'unnamed'}, by its quantization_config)",
        ("because", "quantised checkpoints are read in bitsandbytes' formats: int8, nf4, fp4"),
        ("way out", "pass the unquantised base that it was made from, with --quant nf4 or int8 if memory is short"),
    )


def packing(name: str, config: Any, quant: QuantRecipe | None) -> QuantRecipe | None:
    """How a base's linear layers are packed once it is loaded: by its files, or as ``quant`` asks; None for dense ones.

    Raises:
        ConfigError: both.
        ModelError: as ``check_readable``.
    """
    stored = check_readable(name, config)
    if stored and quant:
        raise ConfigError(f"--quant {quant.kind}: {name} is quantised already ({stored})", ("way out", "leave it out"))
    return stored or quant


def check_dense(name: str, config: Any) -> None:
    """Refuse a base whose weights are stored quantised.

    Raises:
        ModelError: naming the kind of quantisation.
    """
    if recipe := check_readable(name, config):
        raise ModelError(
            f"--model: the weights of {name} are quantised ({recipe}), and this needs dense ones",
            ("way out", "pass the unquantised base that it was made from"),
        )


def checkpoint_dtype(config: Any) -> torch.dtype:
    """The dtype a checkpoint says it is stored in; float32 when it says nothing."""
    dtype = getattr(config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def storage_dtype(setting: str, config: Any) -> torch.dtype:
    """What ``--dtype`` says for a checkpoint that is written, not computed with: ``auto`` keeps its own."""
    if setting != "auto":
        found = getattr(torch, setting)
        assert isinstance(found, torch.dtype)
        return found
    return checkpoint_dtype(config)


def load_model(
    name: str,
    *,
    dtype: torch.dtype,
    device: str = "cpu",
    revision: str | None = None,
    config: Any = None,
    quant: QuantRecipe | None = None,
    warn: Callable[[str], None] | None = None,
) -> PreTrainedModel:
    """Load a causal language model for training or inference, in ``eval`` mode.

    Args:
        quant: pack the linear layers like this while they are read; a checkpoint that is packed already stays so.
        warn: told about tensors of the checkpoint that the model has no place for.
    Raises:
        ModelError: not found, unreadable, quantised, code needed, or a checkpoint whose tensors do not fit the model.
    """
    config = config if config is not None else load_config(name, revision=revision)
    if recipe := packing(name, config, quant):
        folder = local_copy(name, revision=revision)
        check_weights(folder)
        if quant:
            check_dense_files(folder)
        with explained(name), quiet():
            model, info = load_quantised(folder, config, recipe, dtype=dtype, is_packed=quant is None)
            _cap_scores(model)
    else:
        model, info = _load_dense(name, config, dtype, revision)
    _check_complete(name, info)
    if warn and recipe and (remark := stacks_remark(model)):
        warn(remark)
    if warn and (unused := sorted(map(str, info.get("unexpected_keys", ())))):
        said = counted(len(unused), f"tensor in {name} is not used", f"tensors in {name} are not used")
        them = "it" if len(unused) == 1 else "them"
        warn(f"{said}, its config.json has no place for {them}: {_few(unused, 4)}")
    model.to(device)
    model.eval()
    return model


def _load_dense(name: str, config: Any, dtype: torch.dtype, revision: str | None) -> tuple[PreTrainedModel, Any]:
    from transformers import AutoModelForCausalLM

    folder = name
    if is_local(name):
        folder = str(model_folder(name))
        check_weights(Path(folder))
        check_dense_files(Path(folder))
    with explained(name), quiet():
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            revision=revision,
            dtype=dtype,
            local_files_only=only_local(name),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, all of them at once and by name
            **_NO_CODE,
        )
        _cap_scores(model)
    return model, info


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """Write a model as transformers does, without its progress bars."""
    with quiet():
        model.save_pretrained(str(folder))


def skeleton(config: Any, *, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a config with shapes and no weights, on the meta device."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)  # the library writes the dtype into it
    with quiet(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    return model


def plan_quantised(model: PreTrainedModel, recipe: QuantRecipe, *, dtype: torch.dtype) -> None:
    """Give a skeleton the layers that loading with this recipe would give the model.

    Raises:
        QuantizationError: a name of ``recipe.skip`` that no layer has.
    """
    replace(model, recipe, dtype=dtype)


def packs_experts(model: PreTrainedModel, recipe: QuantRecipe) -> bool:
    """Whether a recipe packs stacks of experts of this dense model, which no other program reads."""
    return bool(quantisable_stacks(model, recipe))


def _cap_scores(model: PreTrainedModel) -> None:
    """Older transformers run Gemma 2 on SDPA, which leaves the cap on attention scores out without a word."""
    if getattr(model.config, "attn_logit_softcapping", None) and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")


def _check_complete(name: str, info: Any) -> None:
    missing = sorted(map(str, info.get("missing_keys", ())))
    mismatched = [item if isinstance(item, tuple) else (item,) for item in info.get("mismatched_keys", ())]
    if missing or mismatched:
        listing = [f"missing    {key}" for key in missing]
        for key, *shapes in sorted(mismatched, key=lambda item: str(item[0])):
            found, expected = (list(shape) for shape in shapes) if len(shapes) == 2 else ("?", "?")
            listing.append(f"misshaped  {key}: found {found}, expected {expected}")
        raise ModelError(
            f"--model: the weights in {name} do not fill the model that its config.json describes",
            ("tensors", _few(listing, 12, "\n")),
            ("way out", "fetch the checkpoint again, or correct its config.json"),
        )


def _few(items: list[str], limit: int, between: str = ", ") -> str:
    more = [f"… and {len(items) - limit} more"] if len(items) > limit else []
    return between.join([*items[:limit], *more])


def local_copy(name: str, *, revision: str | None = None) -> Path:
    """The folder with a model's files: the local one, or the Hub's, fetched into its cache."""
    if is_local(name):
        if revision is not None:
            raise ConfigError("--revision is for models on the Hub, and --model is a folder here")
        return model_folder(name)
    from huggingface_hub import snapshot_download

    with explained(name):
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=list(FETCHED),
                ignore_patterns=list(NOT_FETCHED),
                local_files_only=only_local(name),
            )
        )


def known_copy(name: str, *, revision: str | None = None) -> Path | None:
    """The folder with a model's files where it is on this machine already; nothing is asked of the network.

    Args:
        revision: of a model of the Hub; the commit that was loaded, where that is known.
    """
    if is_local(name):
        path = Path(name).expanduser()
        return path if (path / "config.json").is_file() else None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None
