"""Several adapters by name on one model, of which one computes, or the sum of some, or none.

An adapter is what it is alone: its layers stand in the base's places while it is in use, and beside the model while it
is not, so switching moves references and copies no weight. Parts of the base that an adapter trained in full are its
own copies and change places likewise. A sum is one LoRA of all A and B side by side (``combine``), which is defined for
methods that add to what a layer makes. For inference and merging: training knows one adapter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import nn

from truetune.adapters.base import LowRankUpdate
from truetune.adapters.files import AdapterFile
from truetune.adapters.held import Held, Place, hold
from truetune.adapters.inject import attachment
from truetune.adapters.stack import stacked
from truetune.errors import AdapterError, nearest


class Bank:
    """The adapters of a model, by name. ``bank_of(model)`` finds it again.

    Args:
        model: carries no adapter yet; frozen by the first one.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._held: dict[str, Held] = {}
        self._in_use: Held | None = None
        self._weights: dict[str, float] = {}
        self._sum: tuple[Mapping[str, float], Held] | None = None  # the last one, which may be asked for again
        self._learned = [p for p in model.parameters() if p.requires_grad]
        self._check_alone()
        model.truetune_bank = self  # type: ignore[assignment]

    @property
    def names(self) -> tuple[str, ...]:
        """In the order in which they were added."""
        return tuple(self._held)

    @property
    def active(self) -> Mapping[str, float]:
        """Name → weight of what the model computes with; empty for the bare base."""
        return self._weights

    def __getitem__(self, name: str) -> Held:
        """The adapter of a name.

        Raises:
            AdapterError: there is none.
        """
        if name not in self._held:
            raise AdapterError(
                f"the model has no adapter '{name}'",
                ("did you mean", nearest(name, self._held)),
                ("it has", ", ".join(self._held) or "none"),
            )
        return self._held[name]

    def updates(self, name: str) -> Mapping[str, LowRankUpdate]:
        """Path → A, B and scale of one adapter; found once, not by walking the model."""
        return self[name].updates

    @property
    def places(self) -> Mapping[str, Place]:
        """Path → where a layer stands that any of the adapters changes, and the base's own layer."""
        return {path: place for held in self._held.values() for path, place in held.places.items()}

    def described(self) -> dict[str, dict[str, Any]]:
        """Name → method, layers, parameters, and the weight it is in use with; None where it is not."""
        return {
            name: {
                "method": held.attachment.config.kind,
                "layers": len(held.attachment.sites),
                "parameters": held.count,
                "weight": self._weights.get(name),
            }
            for name, held in self._held.items()
        }

    def add(self, name: str, file: AdapterFile) -> Held:
        """Load an adapter beside the others; what the model computes stays as it is.

        Raises:
            AdapterError: the name is taken, or the adapter does not fit; then nothing has changed.
        """
        if name in self._held:
            raise AdapterError(
                f"the model already carries an adapter called '{name}'",
                ("way out", f"another name=, or truetune.detach(model, name='{name}') first"),
            )
        self._check_alone()
        if self._in_use:
            self._in_use.unplug(self.model)
        try:
            self._held[name] = hold(self.model, file)
        finally:
            if self._in_use:
                self._in_use.plug(self.model)
            if not self._held:
                self.clear()
        return self._held[name]

    def use(self, names: str | Sequence[str] | None, weights: Sequence[float] | None = None) -> None:
        """Compute with one adapter, with the sum of several, or with none.

        Args:
            names: of adapters, each once.
            weights: what each one's contribution is multiplied by; 1 by default.
        Raises:
            AdapterError: an unknown name, weights that do not fit, or a method that has no sum.
        """
        chosen = [names] if isinstance(names, str) else list(names or ())
        scales = [float(w) for w in weights] if weights is not None else [1.0] * len(chosen)
        if len(scales) != len(chosen) or len(set(chosen)) < len(chosen) or not all(map(math.isfinite, scales)):
            raise AdapterError(
                f"adapters {', '.join(chosen) or 'none'} with weights {', '.join(map(str, scales)) or 'none'}",
                ("expected", "each name once, and a finite weight for each"),
            )
        self._check_alone()
        wanted = dict(zip(chosen, scales, strict=True))
        target = self._target(wanted)
        if self._in_use:
            self._in_use.unplug(self.model)
        self._in_use, self._weights = target, wanted
        if target:
            target.plug(self.model)

    def _target(self, wanted: Mapping[str, float]) -> Held | None:
        found = {name: self[name] for name in wanted}
        if not wanted or list(wanted.values()) == [1.0]:
            return next(iter(found.values()), None)
        if self._sum is None or self._sum[0] != wanted:
            self._sum = (dict(wanted), stacked(found, list(wanted.values())))
        return self._sum[1]

    def remove(self, name: str) -> None:
        """Forget an adapter; if it is in use, what is left of the sum goes on, or the bare base."""
        self[name]
        if name in self._weights:
            rest = {other: weight for other, weight in self._weights.items() if other != name}
            self.use(list(rest), list(rest.values()))
        del self._held[name]
        self._sum = None
        if not self._held:
            self.clear()

    def clear(self) -> None:
        """Forget all of them; the model is as it was before the first."""
        self.use(None)
        self._held.clear()
        self._sum = None
        self.model.requires_grad_(False)
        for parameter in self._learned:
            parameter.requires_grad_(True)
        if bank_of(self.model) is self:
            del self.model.truetune_bank

    def _check_alone(self) -> None:
        """What was attached for training is in no bank, and has no place to go to."""
        now = attachment(self.model)
        if now is not (self._in_use and self._in_use.attachment):
            raise AdapterError(
                "the model already carries an adapter, put there for training",
                ("way out", "truetune.save_adapter, then truetune.detach(model), and load it by a name"),
            )
        if self._in_use and any(getattr(layer, "is_merged", False) for layer in self._in_use.layers.values()):
            raise AdapterError("a layer is merged where it stands", ("way out", "layer.unmerge() first"))


def bank_of(model: nn.Module) -> Bank | None:
    """The model's bank, if adapters were loaded into one."""
    return cast("Bank | None", getattr(model, "truetune_bank", None))
