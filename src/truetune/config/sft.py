"""Settings of ``truetune sft`` and ``truetune pretrain``."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import model_validator
from typing_extensions import Self

from truetune.config.groups import BaseGroup, LengthGroup, RunGroup, TrainingGroup
from truetune.config.methods import METHODS, MethodName, TuningGroup
from truetune.config.options import option
from truetune.config.quant import QuantGroup


class TrainConfig(BaseGroup, QuantGroup, LengthGroup, TuningGroup, TrainingGroup, RunGroup):
    """What both training commands have in common; not a command of its own."""

    data: tuple[str, ...] = option(
        help="files, folders or globs: json, jsonl, csv, parquet, txt",
        group="dataset",
        alias=("dataset",),
        min_length=1,
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.val_split and self.val_data:
            raise ValueError("--val-split and --val-data: each names the held-out rows; keep one of the two")
        if (self.select == "best" or self.eval_every) and not (self.val_split or self.val_data):
            flag = "--select best" if self.select == "best" else "--eval-every"
            raise ValueError(f"{flag} needs held-out rows: add --val-split 0.05 or --val-data FILE")
        if self.quant != "none" and not METHODS[self.method].on_quantised:
            raise ValueError(
                f"--quant {self.quant}: packed weights can't be trained, and --method {self.method} trains the base's "
                "own; --method lora trains beside them"
            )
        if self.lora_plus_ratio != 1 and not METHODS[self.method].has_low_rank_pair:
            with_pair = ", ".join(name for name, method in METHODS.items() if method.has_low_rank_pair)
            raise ValueError(
                f"--lora-plus-ratio: --method {self.method} has no A and B to learn at two rates; {with_pair} do"
            )
        return self

    @property
    def peak_lr(self) -> float:
        """The learning rate asked for, or the method's usual one."""
        return self.lr if self.lr is not None else METHODS[self.method].lr


class SFTConfig(TrainConfig):
    """Settings of ``truetune sft``: supervised fine-tuning on instructions, conversations or texts."""

    command: ClassVar[str] = "sft"

    format: Literal["auto", "alpaca", "sharegpt", "messages", "prompt-completion", "text"] = option(
        "auto", help="form of the rows; auto tells it from the columns", group="dataset"
    )
    template: str = option(
        "auto",
        help="chat template: auto (the tokenizer's own), alpaca, chatml, plain, or a Jinja file",
        group="dataset",
    )
    system: str | None = option(
        None, help="system message for conversations that have none", group="dataset", alias=("default_system",)
    )
    on_overlong: Literal["auto", "error", "drop", "truncate"] = option(
        "auto",
        help="rows over --max-length: auto leaves out up to 1 % (or one row) and stops above, error stops at the first",
        group="dataset",
    )
    train_on: Literal["assistant", "last", "all"] = option(
        "assistant", help="tokens that carry a loss: every answer, the last answer, or everything", group="dataset"
    )


class PretrainConfig(TrainConfig):
    """Settings of ``truetune pretrain``: every token of raw text is learned, cut into blocks of --max-length."""

    command: ClassVar[str] = "pretrain"

    method: MethodName = option("full", help="how to tune", group="tuning", alias=("tuner_type", "train_type"))
