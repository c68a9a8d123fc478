"""Methods that train the base's own weights: all of them, some layers, or a few layers at a time."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import Parameter

from truetune.adapters.parts import full_modules, parameters_of
from truetune.config.adapter import AdapterConfig
from truetune.config.other_methods import Freeze, Lisa
from truetune.errors import AdapterError
from truetune.ops.rng import permutation

_LAYER = re.compile(r"\.(\d+)\.")


def unfreeze(model: nn.Module, config: AdapterConfig) -> None:
    """Let the parameters that a method trains require gradients, and no others.

    Raises:
        AdapterError: nothing would be trained; layers or parts that the model does not have; or parts named beside a
            method that trains all of them.
    """
    if config.token_rows:
        raise AdapterError(
            f"--token-rows: --method {config.kind} trains whole parameters of the base, and leaves a model",
            ("way out", "--method lora trains rows beside its adapter"),
        )
    if not isinstance(config, Freeze):
        if config.trainable:
            raise AdapterError(
                f"--trainable {' '.join(config.trainable)}: --method {config.kind} trains all of the base"
            )
        if isinstance(config, Lisa):
            _check_count(model, "--lisa-layers", config.lisa_layers)
        model.requires_grad_(True)
        return
    parts = parameters_of(model, config.trainable, full_modules(model, config.trainable))
    chosen = {id(p) for p in (*_chosen(model, config), *parts)}
    if not chosen:
        raise AdapterError(
            "--train-layers 0: nothing would be trained", ("way out", "--train-layers 2, or --trainable head")
        )
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)


def parameters_by_layer(model: nn.Module) -> dict[int, list[Parameter]]:
    """Number of a decoder layer -> its parameters; what is in none (embeddings, head, last norm) is left out."""
    layers: dict[int, list[Parameter]] = {}
    for name, parameter in model.named_parameters():
        if found := _LAYER.search(name):
            layers.setdefault(int(found[1]), []).append(parameter)
    return dict(sorted(layers.items()))


class LayerDraws:
    """LISA: embeddings and head are always trained, and a few layers with them.  Pan et al. 2024, arXiv:2403.17919.

    As in the paper's algorithm 1, layers are drawn uniformly every so many steps, and nothing is kept of those that are
    not drawn: the optimizer's state of a layer that goes to rest is dropped, and it starts anew when drawn again. That
    is what saves the memory. Which layers those are is a function of the seed and the step, so a resumed run draws the
    same ones.

    Between steps every parameter requires gradients: all of them belong to what the run trains, and to its checkpoints.

    Args:
        model: after ``unfreeze``.
    """

    def __init__(self, model: nn.Module, config: Lisa, *, seed: int) -> None:
        self.config, self.seed = config, seed
        self.layers = parameters_by_layer(model)

    def drawn(self, step: int) -> set[int]:
        """Numbers of the layers that are trained in a step, counted from 0."""
        order = permutation(len(self.layers), self.seed, "lisa", step // self.config.lisa_every)
        numbers = list(self.layers)
        return {numbers[place] for place in order[: self.config.lisa_layers].tolist()}

    @contextlib.contextmanager
    def at(self, step: int, optimizer: torch.optim.Optimizer | None = None) -> Iterator[None]:
        """Only what is trained in this step requires gradients inside, and has state in the optimizer."""
        drawn = self.drawn(step)
        resting = [p for number, parameters in self.layers.items() if number not in drawn for p in parameters]
        for parameter in resting:
            parameter.requires_grad_(False)
            if optimizer is not None:
                optimizer.state.pop(parameter, None)
        try:
            yield
        finally:
            for parameter in resting:
                parameter.requires_grad_(True)


def at_once(model: nn.Module, config: AdapterConfig, *, seed: int) -> contextlib.AbstractContextManager[None]:
    """A context in which just what is trained at the same time requires gradients, to count it."""
    return LayerDraws(model, config, seed=seed).at(0) if isinstance(config, Lisa) else contextlib.nullcontext()


def _chosen(model: nn.Module, config: Freeze) -> list[Parameter]:
    named = dict(model.named_parameters())
    if config.train_pattern is None:
        layers = parameters_by_layer(model)
        _check_count(model, "--train-layers", config.train_layers)
        numbers = list(layers)[len(layers) - config.train_layers :]
        return [parameter for number in numbers for parameter in layers[number]]
    try:
        chosen = [parameter for name, parameter in named.items() if re.search(config.train_pattern, name)]
    except re.error as error:
        raise AdapterError(f"--train-pattern: {config.train_pattern!r} is no regular expression: {error}") from None
    if not chosen:
        raise AdapterError(
            f"--train-pattern: {config.train_pattern!r} matches no parameter",
            ("it has", ", ".join([*named][:6]) + ", …"),
        )
    return chosen


def _check_count(model: nn.Module, flag: str, asked: int) -> None:
    if asked > (has := len(parameters_by_layer(model))):
        raise AdapterError(f"{flag} {asked}: the model has {has} decoder layers", ("all of them", "--method full"))
