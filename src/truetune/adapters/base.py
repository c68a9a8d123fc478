"""The contract: what the rest of the house may ask of an adapter.

An adapter wraps one frozen layer, keeps it as ``base``, and owns a few new parameters. Merging is a pure function in
the adapter's own file, used by the live module and by the streaming export alike; nothing is ever added to a weight in
place, and nothing changes behind ``train()`` or ``eval()``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn
from torch.nn import Parameter

from truetune.errors import AdapterError

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LowRankUpdate:
    """s (B A x + β), what an adapter of the low-rank family adds to what its layer makes of x.

    Attributes:
        a: [r, in]; of an embedding table [r, vocab], of a convolution [r, in, k…].
        b: [out, r]; [dim, r], [out, r, 1…].
        scale: s.
        shift: β, [out], where there is one.
        kind: of the layer.
    """

    a: Tensor
    b: Tensor
    scale: float
    shift: Tensor | None = None
    kind: Literal["linear", "embedding", "convolution"] = "linear"


class Adapter(nn.Module, ABC):
    """One wrapped layer.

    ``files`` maps each own parameter's attribute to its suffix in PEFT's adapter file.
    """

    files: ClassVar[Mapping[str, str]]
    whole_keys: ClassVar[bool] = False
    """Its tensors are the model's and not one layer's: their suffixes are their whole keys in the file."""

    base: nn.Module

    def adapter_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """``(suffix in the file, parameter)`` of each trained tensor this adapter owns."""
        for attribute, suffix in self.files.items():
            yield suffix, getattr(self, attribute)

    def makers(self) -> Iterator[tuple[str, Parameter]]:
        """Trained tensors that the file's are made of while training: in a run's state, in no adapter's file."""
        return iter(())

    def shared_parameters(self) -> Iterator[Parameter]:
        """Trained tensors that this layer computes with and another adapter owns."""
        return iter(())

    def shared_tensors(self) -> Mapping[str, Tensor]:
        """What the layers of a model compute with together and none of them trains, by its whole key in the file."""
        return {}

    def training_state(self) -> Mapping[str, Tensor]:
        """What a resumed run needs beside the parameters, by name; no part of the adapter's file."""
        return {}

    def settle(self) -> None:
        """Let go of what only training needed; what the layer computes stays as it is."""

    @property
    def weight(self) -> Tensor:
        """The base's weight, for model code that reads it directly."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The base's bias, likewise."""
        bias = getattr(self.base, "bias", None)
        return bias if isinstance(bias, Tensor) else None

    def changes(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Change]:
        """What merging does to the base's parameters, by their names (``weight``, ``bias``).

        Args:
            tensors: the adapter's own, by their suffixes in the file.
        Returns:
            Pure functions, from a dense parameter as the base stores it to a new one of its shape and dtype.
        Raises:
            AdapterError: the method does not fold into weights.
        """
        raise AdapterError(f"{type(self).__name__} does not fold into the base's weights: serve it beside the base")

    def update(self, own: Mapping[str, Tensor] | None = None) -> LowRankUpdate | None:
        """What the adapter adds, where that is a low-rank map and all that it does; else None.

        Args:
            own: tensors to take in place of the layer's, by their suffixes in the file.
        """
        return None

    @abstractmethod
    def merged_weight(self) -> Tensor:
        """The base's weight with the adapter folded in: a new tensor, stored as the base stores its own."""

    @abstractmethod
    def forward(self, x: Tensor) -> Any:
        """As the base's."""
