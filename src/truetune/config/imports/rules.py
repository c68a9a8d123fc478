"""How a key of another program is read, and the record of it: no key of a file is passed over without a line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from truetune.config.groups import OPTIMIZERS

Kind = Literal["taken", "changed", "default", "no effect", "not taken", "unknown"]


@dataclass(frozen=True)
class Line:
    """What became of one key: in which of our settings it is, and why not."""

    theirs: str
    value: Any
    kind: Kind
    ours: str = ""  # "field = value"
    note: str = ""


@dataclass(frozen=True)
class Meaning:
    """What a value means to us.

    Attributes:
        settings: ours; empty where there is none for it.
        note: what differs, or why there is none.
        harmless: whether a run is the same without it.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    harmless: bool = False


Rule = Callable[[Any, Mapping[str, Any]], Meaning]
"""From a value, and all that the file says, to what it means."""


@dataclass(frozen=True)
class Program:
    """Another program's config.

    Attributes:
        name: as people know it.
        marks: keys that tell it from others' configs.
        rules: by key.
        defaults: of its own, in our settings, where they are not ours; given what the file says.
    """

    name: str
    marks: frozenset[str]
    rules: Mapping[str, Rule]
    defaults: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    batch: tuple[str, str]  # examples on one device at once, and steps until the optimizer's
    batch_defaults: tuple[int, int] = (8, 1)


@dataclass(frozen=True)
class Imported:
    """Settings of ours, and a line for each key of theirs."""

    program: str
    command: Literal["sft", "pretrain"]
    settings: Mapping[str, Any]
    lines: tuple[Line, ...]


def to(name: str, change: Callable[[Any], Any] | None = None, note: str = "") -> Rule:
    """The value, perhaps changed, is our setting ``name``."""
    return lambda value, said: Meaning({name: change(value) if change else value}, note)


def chosen(name: str, values: Mapping[str, str], note: str) -> Rule:
    """One of their names is one of ours; any other is not taken, with ``note``."""

    def rule(value: Any, said: Mapping[str, Any]) -> Meaning:
        found = values.get(str(value).lower())
        return Meaning({name: found}) if found is not None else Meaning({}, note)

    return rule


def nothing(note: str) -> Rule:
    """A key without effect on what is trained here."""
    return lambda value, said: Meaning({}, note, harmless=True)


def lost(note: str) -> Rule:
    """A key that changes what is trained, and that we have no setting for; switched off, it is harmless."""

    def rule(value: Any, said: Mapping[str, Any]) -> Meaning:
        return Meaning({}, "off" if is_off(value) else note, harmless=is_off(value))

    return rule


def is_off(value: Any) -> bool:
    """Whether a value says no."""
    return value in (None, False, 0, "", "no", "none", "None", "false", "False") or value == [] or value == {}


def is_on(value: Any) -> bool:
    """Whether a value says yes, also as a command line says it."""
    return value is True or str(value).lower() in ("true", "1", "yes", "on")


def names(value: Any) -> list[str]:
    """``a,b`` or a list, as a list."""
    items = value if isinstance(value, list | tuple) else str(value).replace(",", " ").split()
    return [str(item).strip() for item in items if str(item).strip()]


def targets(value: Any) -> list[str]:
    """Layers; ``all`` is every linear one."""
    found = names(value)
    return ["all-linear"] if any(name in ("all", "all-linear", "ALL") for name in found) else found


SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant"}
SCHEDULE = chosen("schedule", SCHEDULES, "no such schedule here: cosine is taken; known are cosine, linear, constant")


def optimizer(value: Any, said: Mapping[str, Any]) -> Meaning:
    """transformers' and bitsandbytes' names."""
    name = str(value).lower()
    plain = name.removeprefix("paged_").removeprefix("bitsandbytes.optim.").removeprefix("torch.optim.")
    for ending in ("_torch_fused", "_torch", "_fused", "_hf", "_bnb"):
        plain = plain.removesuffix(ending)
    plain = plain.replace("_bnb_8bit", "8bit").replace("_8bit", "8bit").replace("_32bit", "")
    plain = plain.removeprefix("paged")
    if plain not in OPTIMIZERS:
        return Meaning({}, f"no such optimizer here: adamw is taken; known are {', '.join(OPTIMIZERS)}")
    note = "not paged: its state stays in memory" if "paged" in name else ""
    return Meaning({"optim": plain}, note)


def warmup_ratio(value: Any, said: Mapping[str, Any]) -> Meaning:
    """A share of all steps; steps that are named as well go before it."""
    steps = said.get("warmup_steps")
    if steps not in (None, 0, "0"):
        return Meaning({}, f"warmup_steps {steps} goes before it", harmless=True)
    return Meaning({"warmup": float(value)})


def warmup_steps(value: Any, said: Mapping[str, Any]) -> Meaning:
    """A number of steps; none leaves a share that is named."""
    if float(value) == 0:
        return Meaning({}, "see warmup_ratio", harmless=True) if said.get("warmup_ratio") else Meaning({"warmup": 0.0})
    return Meaning({"warmup": float(value)})


def half(name: str) -> Rule:
    """``bf16`` and ``fp16``: whether the base is computed in it."""

    def rule(value: Any, said: Mapping[str, Any]) -> Meaning:
        if not is_on(value):
            return Meaning({}, "off" if is_off(value) else "auto is ours as well", harmless=True)
        return Meaning({"dtype": name}, "the frozen weights; what is trained stays in float32")

    return rule


def bits(value: Any, said: Mapping[str, Any]) -> Meaning:
    """How many bits a base is stored in."""
    found = {"4": "nf4", "8": "int8"}.get(str(value))
    if found == "nf4" and str(said.get("quantization_type", said.get("bnb_4bit_quant_type", "nf4"))) == "fp4":
        found = "fp4"
    if found is None:
        return Meaning({}, "" if is_off(value) else "known are 4 and 8 bits", harmless=is_off(value))
    return Meaning({"quant": found})


def on(settings: Mapping[str, Any], note: str = "") -> Rule:
    """Settings that hold where the value says yes."""

    def rule(value: Any, said: Mapping[str, Any]) -> Meaning:
        return Meaning(settings, note) if is_on(value) else Meaning({}, "off", harmless=True)

    return rule


def read(program: Program, said: Mapping[str, Any], *, devices: int) -> Imported:
    """Read what a file says, key by key.

    Args:
        devices: that it was written for: each takes examples of its own, and their sum is our batch.
    """
    settings: dict[str, Any] = {}
    lines: list[Line] = []
    for key, value in said.items():
        if key in program.batch:
            continue
        rule = program.rules.get(key)
        if rule is None:
            lines.append(Line(key, value, "unknown", note="look up what it does, and whether a setting here does it"))
            continue
        if value is None:
            lines.append(Line(key, value, "no effect", note="not set"))
            continue
        try:
            meaning = rule(value, said)
        except (TypeError, ValueError, AttributeError) as error:
            lines.append(Line(key, value, "not taken", note=f"a value that can't be read: {error}"))
            continue
        settings |= meaning.settings
        lines.append(_line(key, value, meaning))
    if "peft_type" not in said:  # an adapter's own file says nothing of a run
        lines += _batch(program, said, devices, settings)
    for name, value in program.defaults(said).items():
        if name not in settings:
            settings[name] = value
            lines.append(Line("", None, "default", f"{name} = {_shown(value)}", f"{program.name}'s default"))
    command: Literal["sft", "pretrain"] = settings.pop("command", "sft")
    return Imported(program.name, command, settings, tuple(lines))


def _is(ours: Any, theirs: Any) -> bool:
    """Whether two values are one; on a command line, and in YAML as 1e-4, numbers are texts."""
    if ours == theirs or not isinstance(theirs, str) or isinstance(ours, bool | str):
        return bool(ours == theirs)
    try:
        return bool(float(theirs) == ours)
    except ValueError:
        return [theirs] == list(ours) if isinstance(ours, list | tuple) else False


def _line(key: str, value: Any, meaning: Meaning) -> Line:
    ours = ", ".join(f"{name} = {_shown(v)}" for name, v in meaning.settings.items())
    if not ours:
        return Line(key, value, "no effect" if meaning.harmless else "not taken", note=meaning.note)
    same = len(meaning.settings) == 1 and all(_is(one, value) for one in meaning.settings.values())
    return Line(key, value, "taken" if same and not meaning.note else "changed", ours, meaning.note)


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _batch(program: Program, said: Mapping[str, Any], devices: int, settings: dict[str, Any]) -> list[Line]:
    """Our batch is what an optimizer step sees: examples at once, times accumulation, times devices."""
    given = [said.get(key) for key in program.batch]
    try:
        each, steps = (int(v) if v is not None else d for v, d in zip(given, program.batch_defaults, strict=True))
    except (TypeError, ValueError):
        return [Line(key, said[key], "not taken", note="no number: give --batch-size yourself") for key in program.batch
                if key in said]  # fmt: skip
    settings["batch_size"] = each * steps * devices
    sum_of = f"{each} at once × {steps} accumulated × {devices} device{'s' * (devices != 1)}"
    ours = f"batch_size = {settings['batch_size']}"
    lines = [Line(key, said[key], "changed", ours, sum_of) for key in program.batch if key in said]
    return lines or [Line("", None, "default", ours, f"{program.name}'s default: {sum_of}")]
