"""Going on from an adapter: its method, layers and sizes are given, and a setting that says otherwise is refused.

With ``--on-top-of`` the adapter stays as it is, beneath a new one that has settings of its own.

What only training reads may be set anew (dropout). AdaLoRA's ranks are final, so they stay as they are. Where a network
made what the file holds (P-tuning, prefix with a projection), the file's rows themselves are trained.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from truetune.adapters import files, vocabulary
from truetune.adapters.files import AdapterFile
from truetune.adapters.inject import attachment, tune
from truetune.adapters.methods import module_of
from truetune.adapters.parts import full_modules
from truetune.adapters.peft_config import saved_modules
from truetune.adapters.targets import targeted
from truetune.adapters.vocabulary import NewTokens
from truetune.checkpoint.atomic import sha256
from truetune.config.adapter import AdapterConfig, Targeted
from truetune.config.methods import METHODS, TUNING_FIELDS
from truetune.config.resolve import Resolved
from truetune.config.sft import TrainConfig
from truetune.errors import AdapterError, ConfigError
from truetune.models import load
from truetune.models.tokenizer import ChatTokenizer
from truetune.recipes.adapter import check_base, check_tokenizer, packing_remark
from truetune.recipes.data import Prepared
from truetune.recipes.new_tokens import Admitted, tokenizer_of
from truetune.recipes.setup import TRAINING_ONLY, Setup
from truetune.train.log import Screen

_PLACES = ("targets", "exclude", "layers")  # compared by the layers that they mean
_START = ("init", "d_initial", "prompt_text", "projection", "encoder", "encoder_hidden", "orthogonality")


@dataclass(frozen=True)
class Begun:
    """The adapter that a run goes on from, and what was set before its settings took their place.

    ``stays`` says that it is not trained itself, but stays beneath a new one.
    """

    file: AdapterFile
    asked: Resolved[Any]
    stays: bool = False

    @property
    def identity(self) -> str:
        """What a resumed run must find again."""
        path = self.file.folder / files.WEIGHTS
        return sha256(path) if path.is_file() else "older format"

    @property
    def holds_parts(self) -> bool:
        """Whether it has parts of the base that are trained in full."""
        return bool(self.file.config.get("modules_to_save")) and not self.stays

    def check(self, model_config: Any, screen: Screen) -> None:
        """Compare the base that it was trained on with the one that the run names, and the layers that both mean.

        Raises:
            AdapterError: another base, or names that match nothing.
            ConfigError: ``--targets`` and the like that mean other layers.
        """
        config: TrainConfig = self.asked.config
        with _final():
            check_base(self.file, config.model, load.local_copy(config.model, revision=config.revision))
        if remark := packing_remark(self.file, load.packing(config.model, model_config, config.recipe())):
            screen.warn(remark)
        if self.stays:
            return
        dtype = load.checkpoint_dtype(model_config)
        _check_places(self.file, self.asked, load.skeleton(load.dense_config(model_config), dtype=dtype))

    def admitted(self, tokenizer: ChatTokenizer, screen: Screen) -> tuple[ChatTokenizer, Admitted]:
        """The tokenizer with the tokens that it brings, and the rows that go on being trained.

        Raises:
            AdapterError: another vocabulary.
        """
        with _final():
            check_tokenizer(self.file, tokenizer)
        tokens = tokenizer_of(self.file, tokenizer, screen)
        return tokens, Admitted(NewTokens.of_card(self.file.card), self.file.settings.token_rows)

    def say_template(self, prepared: Prepared, screen: Screen) -> None:
        """Whose template this is; another one that was asked for is taken, and what that means is said."""
        trained = self.file.card.get("template")
        if prepared.template is None or not trained:
            return
        if prepared.template.digest == trained["sha256"]:
            screen.note(f"template: {trained['name']}, as {self.file.folder} was trained")
        else:
            screen.warn(f"{self.file.folder} was trained with the template {trained['name']}; from here on it learns "
                        f"{prepared.template.name}, and is to be asked with that")  # fmt: skip


@contextlib.contextmanager
def _final() -> Iterator[None]:
    """Refusals that nothing allows in training."""
    try:
        yield
    except AdapterError as error:
        notes = [note for note in error.notes if note[0] != "way out"]
        way_out = ("way out", "--model with the base that the adapter was trained on")
        raise AdapterError(error.message, *notes, way_out) from None


def read_start(resolved: Resolved[Any]) -> tuple[Resolved[Any], Begun | None]:
    """The settings of a run with those of the adapter that it goes on from, and that adapter, where there is one.

    Raises:
        AdapterError: it can't be read.
        ConfigError: settings that contradict it, by name.
    """
    config: TrainConfig = resolved.config
    if config.on_top_of is not None:
        return _on_top(resolved, files.read(Path(config.on_top_of).expanduser()))
    if config.adapter is None:
        return resolved, None
    file = files.read(Path(config.adapter).expanduser())
    settings, given = file.settings, _given(resolved)
    _check(config, settings, given, file)
    values = {name: getattr(config, name) for name, source in resolved.sources.items() if source != "default"}
    own = {name: getattr(settings, name) for name in type(settings).model_fields}
    anew = {name for name in TRAINING_ONLY if name in own}
    values = {name: value for name, value in values.items() if name not in TUNING_FIELDS or name in anew}
    taken = {"method": settings.kind, **own, **{n: values[n] for n in anew & given}}
    if "system" in type(config).model_fields and "system" not in values and file.card.get("system") is not None:
        taken["system"] = file.card["system"]
    sources = {**resolved.sources, **{n: "adapter" for n in taken if n not in given}}
    return replace(resolved, config=type(config)(**{**values, **taken}), sources=sources), Begun(file, resolved)


def _on_top(resolved: Resolved[Any], file: AdapterFile) -> tuple[Resolved[Any], Begun]:
    """The settings as they are, but for the system message that the adapter beneath was trained with.

    Raises:
        ConfigError: that adapter brings tokens, which would be in neither's file.
    """
    if file.settings.token_rows:
        raise ConfigError(
            f"--on-top-of {file.folder}: it brings rows of tokens, and those of two adapters do not add up",
            ("way out", "truetune merge folds it into the base, with its tokens; or go on from it with --adapter"),
        )
    config, own, sources = resolved.config, file.card.get("system"), resolved.sources
    if "system" in type(config).model_fields and own is not None and sources.get("system") == "default":
        resolved = replace(resolved, config=config.model_copy(update={"system": own}),
                           sources={**sources, "system": "adapter"})  # fmt: skip
    return resolved, Begun(file, resolved, stays=True)


def _given(resolved: Resolved[Any]) -> set[str]:
    """The settings of the method that somebody set; ``run.yaml`` spells defaults out, and they count as not set."""
    config, fields = resolved.config, {*TUNING_FIELDS, "method", "new_tokens"}
    defaults = {n: f.default for n, f in type(config).model_fields.items()}
    defaults |= {n: f.default for n, f in METHODS[config.method].config.model_fields.items()}
    defaults |= {"method": type(config).model_fields["method"].default, "new_tokens": ()}
    return {
        name
        for name, source in resolved.sources.items()
        if name in fields and (source == "flag" or (source == "file" and getattr(config, name) != defaults.get(name)))
    }


def _check(config: TrainConfig, settings: AdapterConfig, given: set[str], file: AdapterFile) -> None:
    own = type(settings).model_fields
    wrong = {}
    for name in sorted(given - {*TRAINING_ONLY, *_PLACES, "trainable"}):
        there = settings.kind if name == "method" else getattr(settings, name, None)
        if name in _START and getattr(config, name) != there:
            wrong[name] = "which the adapter is beyond"
        elif name not in own and name != "method":
            wrong[name] = f"and the adapter's method is {settings.kind}"
        elif getattr(config, name) != there:
            wrong[name] = f"and the adapter has {_text(there)}"
    if wrong:
        raise _contradiction({n: f"{_text(getattr(config, n))}, {why}" for n, why in wrong.items()}, file)


def _contradiction(wrong: Mapping[str, str], file: AdapterFile) -> ConfigError:
    flags = [f"--{name.replace('_', '-')}: {what}" for name, what in wrong.items()]
    return ConfigError(
        f"--adapter {file.folder}: settings that say otherwise",
        ("found", "\n".join(flags)),
        ("way out", "leave them out: method, layers and sizes are the adapter's; without --adapter a new one starts"),
    )


def _check_places(file: AdapterFile, asked: Resolved[Any], model: Any) -> None:
    """That targets and parts that were named anew mean the adapter's own; an empty model will do."""
    given = {name: getattr(asked.config, name) for name in _given(asked) & {*_PLACES, "trainable"}}
    if not given:
        return
    settings = file.settings
    wrong = {}
    places = {name: value for name, value in given.items() if name in _PLACES}
    if places and isinstance(settings, Targeted):
        meant = module_of(settings.kind).sites(model, settings.model_copy(update=places))
        there = targeted(model, settings, all_must_match=False)
        if set(meant) != set(there):
            wrong = {
                n: f"{_text(v)}: {len(meant)} layers, and the adapter is on {len(there)}" for n, v in places.items()
            }
    parts = given.get("trainable", ())
    if parts and set(full_modules(model, parts)) != set(saved_modules(model, file.config)):
        wrong["trainable"] = f"{_text(parts)}, and the adapter has {_text(file.config.get('modules_to_save') or ())}"
    if wrong:
        raise _contradiction(wrong, file)


def put_on(setup: Setup, model: Any) -> int:
    """The run's method on a model, as it starts or as the adapter left it; returns the number of its layers."""
    if setup.on is not None:
        on = files.attach_on(model, setup.on, config=setup.adapter, seed=setup.config.seed, prompt_ids=setup.prompt_ids)
        return len(on.sites)
    if setup.start is not None:
        files.load(model, setup.start, config=setup.adapter, trained=True)
        attached = attachment(model)
        assert attached is not None
        return len(attached.sites)
    if setup.new:
        vocabulary.admit(model, setup.new)
    return len(tune(model, setup.adapter, seed=setup.config.seed, prompt_ids=setup.prompt_ids))


def _text(value: Any) -> str:
    return (" ".join(map(str, value)) or "none") if isinstance(value, list | tuple) else str(value)
