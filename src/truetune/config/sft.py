"""Settings of ``truetune sft`` and ``truetune pretrain``."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import field_validator, model_validator
from typing_extensions import Self

from truetune.config.groups import BaseGroup, FormatName, LengthGroup, RunGroup, TrainingGroup
from truetune.config.methods import METHODS, MethodName, TuningGroup
from truetune.config.options import Options, option
from truetune.config.quant import QuantGroup


class VocabularyGroup(Options):
    """Tokens that the base does not have."""

    new_tokens: tuple[str, ...] = option(
        (),
        help="tokens to add to the tokenizer, such as '<tool>', or a .txt file with one per line; their rows of the "
        "embedding table and the head are trained beside the adapter",
        group="tuning",
        alias=("add_tokens",),
    )

    @field_validator("new_tokens")
    @classmethod
    def _not_blank_tokens(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if any(not token.strip() for token in value):
            raise ValueError("tokens that are not blank")
        return tuple(dict.fromkeys(value))


class TrainConfig(RunGroup, TrainingGroup, VocabularyGroup, TuningGroup, LengthGroup, QuantGroup, BaseGroup):
    """What both training commands have in common; not a command of its own."""

    adapter: str | None = option(
        None,
        help="go on from an adapter: its method, layers and sizes are taken, and its template unless another is named",
        group="tuning",
        alias=("resume_adapter", "adapter_name_or_path"),
        min_length=1,
    )

    on_top_of: str | None = option(
        None,
        help="train a new adapter on top of this one, which stays frozen; the result brings both, and its template is "
        "taken unless another is named",
        group="tuning",
        min_length=1,
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        self._check_on_top()
        if self.val_split and self.val_data:
            raise ValueError("--val-split and --val-data: each names the held-out rows; keep one of the two")
        if (self.select == "best" or self.eval_every) and not (self.val_split or self.val_data):
            flag = "--select best" if self.select == "best" else "--eval-every"
            raise ValueError(f"{flag} needs held-out rows: add --val-split 0.05 or --val-data FILE")
        if self.verify and not self.verify_prompts:
            raise ValueError("--verify needs prompts to compare by, and --verify-prompts is 0")
        if self.quant != "none" and not METHODS[self.method].on_quantised:
            raise ValueError(
                f"--quant {self.quant}: packed weights can't be trained, and --method {self.method} trains the base's "
                "own; --method lora trains beside them"
            )
        if self.new_tokens and self.method == "freeze":
            raise ValueError(
                "--new-tokens: --method freeze leaves the embedding table as it is, and the new rows with it; --method "
                "lora trains them beside its adapter, --method full with everything"
            )
        if self.lora_plus_ratio != 1 and not METHODS[self.method].has_low_rank_pair:
            with_pair = ", ".join(name for name, method in METHODS.items() if method.has_low_rank_pair)
            raise ValueError(
                f"--lora-plus-ratio: --method {self.method} has no A and B to learn at two rates; {with_pair} do"
            )
        return self

    def _check_on_top(self) -> None:
        """Raises ValueError: what can't be trained on top of an adapter."""
        if self.on_top_of is None:
            return
        if self.adapter:
            raise ValueError("--on-top-of and --adapter: a new adapter on top of one, or that one itself; not both")
        if METHODS[self.method].result == "model":
            raise ValueError(
                f"--on-top-of: --method {self.method} trains the base's own weights and leaves a model; truetune merge "
                "folds the first adapter into the base for that"
            )
        if self.init == "loftq":
            raise ValueError(
                "--on-top-of and --init loftq: what quantising took away is the first adapter's to make up for; train "
                "that one with it"
            )
        if self.new_tokens:
            raise ValueError(
                "--on-top-of and --new-tokens: both adapters share one vocabulary; train the first with them, or go on "
                "from it with --adapter"
            )

    @property
    def peak_lr(self) -> float:
        """The learning rate asked for, or the method's usual one."""
        return self.lr if self.lr is not None else METHODS[self.method].lr


class InstructionGroup(Options):
    """How instructions, conversations and texts are read, worded and cut."""

    format: FormatName = option(
        "auto",
        help="form of the rows; auto tells it from the columns; chosen takes the better answers of preference data",
        group="dataset",
    )
    template: str = option(
        "auto",
        help="chat template: auto (the tokenizer's own), alpaca, plain, one of a family (chatml, deepseek, gemma, "
        "llama2, llama3, mistral, phi3, qwen, tulu, vicuna, zephyr), or a Jinja file",
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
    thinking: Literal["keep", "drop", "error"] = option(
        "keep", help="reasoning in answers (<think>, reasoning_content): kept, dropped, or a fault", group="dataset"
    )
    tools: Literal["keep", "drop", "error"] = option(
        "keep", help="the tools that rows define: kept, dropped (their calls stay), or a fault", group="dataset"
    )
    system_messages: Literal["keep", "drop", "error"] = option(
        "keep", help="the rows' own system messages: kept, dropped, or a fault", group="dataset"
    )
    text_blocks: bool = option(
        False,
        help="join texts and cut them into blocks of --max-length, as truetune pretrain does; not for conversations",
        group="dataset",
        alias=("constant_length",),
    )
    train_on: Literal["assistant", "last", "all"] = option(
        "assistant", help="tokens that carry a loss: every answer, the last answer, or everything", group="dataset"
    )


class SFTConfig(InstructionGroup, TrainConfig):
    """Settings of ``truetune sft``: supervised fine-tuning on instructions, conversations or texts."""

    command: ClassVar[str] = "sft"


class PretrainConfig(TrainConfig):
    """Settings of ``truetune pretrain``: every token of raw text is learned, cut into blocks of --max-length."""

    command: ClassVar[str] = "pretrain"

    method: MethodName = option("full", help="how to tune", group="tuning", alias=("tuner_type", "train_type"))
