"""The groups of settings that the training commands share."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import field_validator, model_validator

from truetune.config.options import Options, option
from truetune.errors import nearest

OPTIMIZERS = tuple(
    f"{name}{bits}"
    for name in ("adamw", "adam", "lion", "ademamix", "rmsprop", "adagrad", "sgd", "lamb", "lars")
    for bits in ("", "8bit")
)
"""What ``--optim`` takes; ``optim.choose`` makes them."""

FormatName = Literal["auto", "alpaca", "sharegpt", "messages", "prompt-completion", "text", "chosen"]
"""What ``--format`` takes; ``data.formats`` knows them."""


class ModelGroup(Options):
    """Which model."""

    model: str = option(
        help="the base: a local folder, or a name on the Hub",
        group="base",
        alias=("model_name_or_path", "base_model"),
        min_length=1,
    )
    revision: str | None = option(None, help="branch, tag or commit of a Hub model", group="base")


class BaseGroup(ModelGroup):
    """Which model, in which precision, where."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto",
        help="precision of the frozen weights; auto keeps the checkpoint's where this machine computes it fast",
        group="base",
        alias=("torch_dtype",),
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", help="where to compute", group="base")
    max_memory: str | None = option(
        None,
        help="most memory that the run may take, such as 6GB: where its plan needs more, layers are computed again in "
        "the backward, and then the frozen base stays on disk and is read layer by layer (CPU)",
        group="base",
    )

    @field_validator("max_memory", mode="before")
    @classmethod
    def _size(cls, value: object) -> object:
        plain = str(value) if isinstance(value, int | float) else value
        if isinstance(plain, str):
            bytes_of(plain)
        return plain

    @property
    def memory_limit_mb(self) -> float | None:
        """``max_memory`` in MB (10^6 bytes)."""
        return None if self.max_memory is None else bytes_of(self.max_memory) / 1e6


def bytes_of(text: str) -> int:
    """The bytes that a size such as ``1.5GB`` means.

    Raises:
        ValueError: not a size above zero.
    """
    found = re.fullmatch(r"(\d+(?:\.\d*)?)([KMGT]?)(I?)B?", text.strip().replace(" ", "").upper())
    if not found or (found[3] and not found[2]):
        raise ValueError("a size such as 1.5GB, 1500MB, 1.5GiB or 1500000000")
    size = int(float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2] or " "))
    if not size:
        raise ValueError("a size above zero, such as 1.5GB")
    return size


class LengthGroup(Options):
    """The files, limits and splits that every kind of data has."""

    data: tuple[str, ...] = option(
        help="files, folders or globs (json, jsonl, csv, tsv, parquet, arrow, txt; also gz, bz2, xz, zst), - for "
        "stdin, hub:ORG/NAME[:SPLIT], or names in --registry; FILE=0.3 takes three rows in ten, FILE=2 each row twice",
        group="dataset",
        alias=("dataset",),
        min_length=1,
    )
    registry: str | None = option(
        None,
        help="a YAML file that names data sets: files, format, columns, weight, sha256 (default: ./data.yaml)",
        group="dataset",
    )
    columns: tuple[str, ...] = option(
        (), help="which column holds which field, as in instruction=question output=answer", group="dataset"
    )
    fim_rate: float = option(
        0.0,
        help="share of the texts told as fill-in-the-middle, for code models (arXiv:2207.14255, which uses 0.5 to 0.9)",
        group="dataset",
        ge=0.0,
        le=1.0,
    )
    max_length: int | None = option(
        None,
        help="longest example, in tokens (default: the model's context, at most 2048)",
        group="dataset",
        alias=("max_seq_length", "cutoff_len"),
        gt=1,
    )
    packing: bool | None = option(
        None,
        help="join examples into rows without padding (default: yes where the model keeps them apart exactly)",
        group="dataset",
    )
    val_split: float = option(
        0.0, help="share of the rows held out, chosen by a hash of their content", group="dataset", ge=0.0, lt=1.0
    )
    val_data: tuple[str, ...] = option(
        (), help="files with held-out rows", group="dataset", alias=("eval_data", "val_dataset")
    )
    max_bad_rows: int = option(
        0, help="faulty rows that may be left out (each is listed in data/rejects.jsonl)", group="dataset", ge=0
    )

    @model_validator(mode="before")
    @classmethod
    def _from_registry(cls, values: object) -> object:
        """Bare names are those of the registry, if one is given; a run's record says where they are from."""
        if not isinstance(values, dict) or not values.get("registry"):
            return values
        named = {}
        for key in {"data", "val_data"} & values.keys():
            given = [values[key]] if isinstance(values[key], str) else values[key]
            named[key] = tuple(
                f"{values['registry']}:{name}" if re.fullmatch(r"[\w-]*\w[\w-]*(=[\d.]+)?", str(name)) else name
                for name in given
            )
        return {**values, **named}


class StepGroup(Options):
    """Which examples a step takes, and how they share micro-batches."""

    batch_size: int = option(
        16,
        help="examples per optimizer step, over all micro-batches",
        group="training",
        alias=("global_batch_size",),
        gt=0,
        le=1_000_000,
    )
    micro_tokens: int | None = option(
        None,
        help="most tokens per micro-batch (default: 768, or the longest row); the loss does not depend on it",
        group="training",
        gt=0,
    )
    seed: int = option(0, help="seed of the adapter's start, the data order and dropout", group="training", ge=0)


class TrainingGroup(StepGroup):
    """The optimizer's side of a run."""

    lr: float | None = option(
        None,
        help="peak learning rate (default: the method's usual one; lora 2e-4, full 2e-5)",
        group="training",
        alias=("learning_rate",),
        gt=0,
    )
    schedule: Literal["cosine", "linear", "constant"] = option(
        "cosine", help="shape of the learning rate after the warm-up", group="training", alias=("lr_scheduler_type",)
    )
    warmup: float = option(
        0.03,
        help="warm-up: a share of all steps below 1, a number of steps from 1 on",
        group="training",
        alias=("warmup_ratio", "warmup_steps"),
        ge=0,
    )
    optim: str = option(
        "adamw",
        help="the optimizer: adamw, adam, lion, ademamix, rmsprop, adagrad, sgd, lamb, lars; with 8bit behind its "
        "name, as in adamw8bit, its state takes a quarter of the memory; lion wants a 3 to 10 times smaller --lr",
        group="training",
        alias=("optimizer",),
    )
    weight_decay: float = option(
        0.0, help="decay of matrices: decoupled; L2 in sgd, lars, rmsprop and adagrad", group="training", ge=0
    )
    lora_plus_ratio: float = option(
        1.0,
        help="how many times faster B learns than A (LoRA+, arXiv:2402.12354, which recommends 16)",
        group="training",
        alias=("loraplus_lr_ratio",),
        gt=0,
    )
    neftune_alpha: float = option(
        0.0,
        help="strength of the noise on the embeddings while training (NEFTune, arXiv:2310.05914: 5, 10 or 15); 0: none",
        group="training",
        alias=("neftune_noise_alpha",),
        ge=0,
    )
    label_smoothing: float = option(
        0.0,
        help="share of each target that is spread over the whole vocabulary while training (arXiv:1512.00567); the "
        "held-out loss stays plain",
        group="training",
        alias=("label_smoothing_factor",),
        ge=0.0,
        lt=1.0,
    )
    clip: float = option(
        1.0,
        help="largest norm of the gradient; 0 turns clipping off",
        group="training",
        alias=("max_grad_norm", "grad_clip"),
        ge=0,
    )
    epochs: float = option(
        3.0, help="passes over the data", group="training", alias=("num_train_epochs",), gt=0, le=1_000_000
    )
    max_steps: int | None = option(
        None, help="exactly this many optimizer steps, whatever --epochs says", group="training", gt=0
    )
    recompute: Literal["auto", "none", "cheap", "full"] = option(
        "auto",
        help="what the backward computes again to save memory: nothing, cheap parts (norms, activations), or full "
        "layers; auto: cheap, and as many full layers as it takes to fit (beside a packed base on a CPU: into 1 GB)",
        group="training",
        alias=("gradient_checkpointing",),
    )

    @field_validator("optim", mode="before")
    @classmethod
    def _known_optimizer(cls, value: object) -> object:
        """Also by transformers' names, such as ``adamw_torch_fused``, ``adamw_8bit`` or ``lion_bnb_8bit``."""
        if not isinstance(value, str):
            return value
        name = re.sub(r"_torch(_fused)?$", "", re.sub(r"_(bnb_)?8bit$", "8bit", value.lower()))
        if name not in OPTIMIZERS:
            close = nearest(name, OPTIMIZERS)
            raise ValueError(", ".join(OPTIMIZERS) + (f"; did you mean '{close}'?" if close else ""))
        return name


class RunGroup(Options):
    """Where the run lives, and what it does along the way."""

    out: str = option("out", help="the run's folder", group="run", alias=("output_dir", "output"), min_length=1)
    eval_every: int = option(
        0,
        help="steps between evaluations on the held-out rows; 0: only before and after",
        group="run",
        alias=("eval_steps",),
        ge=0,
    )
    save_every: int = option(
        100, help="steps between checkpoints; 0: only at the end", group="run", alias=("save_steps",), ge=0
    )
    keep: int = option(
        2, help="newest checkpoints to keep; the best one stays as well", group="run", alias=("save_total_limit",), ge=1
    )
    select: Literal["last", "best"] = option(
        "last", help="which state becomes the result: the last, or the one with the lowest held-out loss", group="run"
    )
    resume: str | None = option(
        None,
        help="auto: go on from the newest valid checkpoint in --out; or a checkpoint's folder",
        group="run",
        alias=("resume_from_checkpoint",),
    )
    verify: bool = option(
        False, help="when done, hold the saved result against the model as it was trained: truetune verify", group="run"
    )
    verify_prompts: int = option(
        8,
        help="prompts that are kept for truetune verify, so many of the training rows and of the held-out ones",
        group="run",
        ge=0,
    )
    log_every: int = option(1, help="steps between rows of log.jsonl", group="run", alias=("logging_steps",), ge=1)
    dry_run: bool = option(False, help="print the plan (rows, tokens, steps, memory, time) and stop", group="run")

    @field_validator("out")
    @classmethod
    def _not_blank(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("a folder's name")
        return value
