"""What every module with packed weights tells of them, so that who counts bytes need not know which kind it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping

from torch import Tensor


class Packed(ABC):
    """A module some of whose own parameters are codes; on a skeleton these have the dense shapes."""

    @property
    @abstractmethod
    def nbytes_by_parameter(self) -> Mapping[str, int]:
        """Own parameter's name → bytes of its codes and scales, known before there are any."""

    @property
    @abstractmethod
    def dense_values(self) -> int:
        """Values that the codes stand for."""

    @property
    @abstractmethod
    def dense_at_once(self) -> int:
        """Values that are made dense for a product."""

    @abstractmethod
    def stored(self) -> Iterator[Tensor]:
        """Codes and scales where they lie in memory; none before there are any."""

    @property
    def packed_bytes(self) -> int:
        """Bytes of all codes and scales."""
        return sum(self.nbytes_by_parameter.values())
