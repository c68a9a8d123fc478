"""Settings of ``truetune merge``."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import model_validator
from typing_extensions import Self

from truetune.config.mismatch import MismatchGroup
from truetune.config.options import option
from truetune.config.quant import QuantGroup
from truetune.config.weighted import check_weights, weighted

CombineName = Literal[
    "cat", "svd", "linear", "ties", "ties-svd", "dare-linear", "dare-linear-svd", "dare-ties", "dare-ties-svd",
    "magnitude-prune", "magnitude-prune-svd",
]  # fmt: skip


class MergeConfig(QuantGroup, MismatchGroup):
    """Settings of ``truetune merge``: fold adapters into their base tensor by tensor, or combine them into one.

    ``--quant`` packs the merged model again.
    """

    command: ClassVar[str] = "merge"

    model: str | None = option(
        None,
        help="the base the adapters were trained on (with --to adapter, default: the one they name)",
        group="base",
        alias=("base_model",),
        min_length=1,
    )
    revision: str | None = option(None, help="branch, tag or commit of a Hub model", group="base")
    adapter: tuple[str, ...] = option(
        help="an adapter's folder; several are added up, each times its weight: DIR=0.7",
        group="base",
        alias=("adapters",),
        min_length=1,
    )
    out: str = option(
        help="folder for the result; must not exist or be empty",
        group="run",
        alias=("output_dir", "output"),
        min_length=1,
    )
    to: Literal["model", "adapter"] = option(
        "model", help="what to write: the base with the adapters in it, or one adapter made of several", group="run"
    )
    combine: CombineName = option(
        "cat",
        help="how several become one: cat is their exact sum, svd the same at a rank of your choice, linear adds A and "
        "B (rough); ties (arXiv:2306.01708), dare (arXiv:2311.03099) and magnitude-prune leave out entries, of A and B "
        "or with -svd of the products",
        group="run",
        alias=("combination_type",),
    )
    rank: int | None = option(
        None, help="rank of the result of --combine …svd (default: the largest of the adapters)", group="run",
        alias=("svd_rank",), gt=0,
    )  # fmt: skip
    density: float | None = option(
        None, help="share of the entries that ties, dare and magnitude-prune keep (default: 0.5)", group="run", gt=0,
        le=1,
    )  # fmt: skip
    seed: int = option(0, help="of what dare leaves out", group="run", ge=0)
    onto: Literal["auto", "original", "dequantized"] = option(
        "auto",
        help="for an adapter trained on a quantised base: merge onto the original weights, or onto what the quantised "
        "ones stand for, which is what it was trained on; auto: the latter",
        group="run",
    )
    max_shard_gb: float = option(5.0, help="largest weight file, in GB", group="run", gt=0)
    verify: bool = option(
        False,
        help="when done, hold the merged model against its adapter beside the base: truetune verify",
        group="run",
    )

    @property
    def weights(self) -> dict[str, float]:
        """Folder → weight, as given."""
        return dict(weighted(text) for text in self.adapter)

    @property
    def how(self) -> str:
        """All that decides what several adapters are together, beside their files."""
        return f"{list(self.weights.values())} {self.combine} {self.rank} {self.density} {self.seed}"

    @property
    def combines(self) -> bool:
        """Whether what is merged or written is another adapter than the one that was given."""
        return list(self.weights.values()) != [1.0] or self.combine != "cat"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_weights(self.adapter)
        if self.to == "model" and self.model is None:
            raise ValueError("--model is missing: the base to merge into; --to adapter makes one adapter of several")
        if self.to == "adapter" and (self.quant != "none" or self.onto != "auto"):
            raise ValueError("--quant and --onto: for a merged model, and --to adapter writes none")
        if self.verify and self.to == "adapter":
            raise ValueError(
                "--verify is for a merged model: truetune verify holds what is made of an adapter against it"
            )
        if self.rank is not None and not self.combine.endswith("svd"):
            raise ValueError(f"--rank: the rank of --combine {self.combine} follows from the adapters'; svd takes one")
        if self.density is not None and self.combine in ("cat", "svd", "linear"):
            raise ValueError(f"--density: --combine {self.combine} keeps every entry; ties and dare leave out some")
        if self.seed and not self.combine.startswith("dare"):
            raise ValueError(f"--seed: --combine {self.combine} draws nothing; dare does")
        return self
