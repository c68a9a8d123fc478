"""GGUF files, for llama.cpp and all that is built on it: a whole model, or a LoRA adapter beside one.

Written one tensor at a time, under another name until complete. Names of tensors and the layout of q8_0 are the
``gguf`` library's; what goes into them is decided in ``gguf_arch``, ``gguf_tensors`` and ``gguf_tokenizer``.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from truetune.adapters.lora import A, B
from truetune.checkpoint.disk import require_space, sync, writing
from truetune.errors import AdapterError, ModelError, OutputError
from truetune.export.gguf_arch import Arch, Value
from truetune.export.gguf_tensors import (
    FILE_TYPES,
    Planned,
    announce,
    encoded,
    laid_out,
    library,
    name_map,
    nbytes,
)  # fmt: skip
from truetune.export.serving import ROOT, Served


@dataclass(frozen=True)
class Written:
    """What a file holds: tensors, bytes of them, and the names of those that are of another type than asked for."""

    tensors: int
    nbytes: int
    others: tuple[str, ...]


def write_model(
    path: Path,
    arch: Arch,
    tensors: Sequence[Planned],
    keys: Mapping[str, Value],
    *,
    kind: str,
    name: str,
    progress: Callable[[int, int], None] | None = None,
) -> Written:
    """Write a whole model.

    Args:
        tensors: as ``gguf_tensors.plan`` gives them.
        keys: hyperparameters and tokenizer, by their full names.
        kind: of the matrices.
        name: ``general.name``.
    Raises:
        OutputError: the file is there, or can't be written.
        ModelError: the weights can't be read, or hold values that ``kind`` can't.
    """
    general: dict[str, Value] = {"general.type": "model", "general.name": name, "general.file_type": FILE_TYPES[kind]}
    if kind == "q8_0":
        general["general.quantization_version"] = 2
    return _write(path, arch, tensors, {**general, **keys}, kind=kind, progress=progress)


def write_adapter(
    path: Path, arch: Arch, config: Any, served: Served, *, kind: str, name: str, shapes: Mapping[str, tuple[int, ...]]
) -> Written:
    """Write a LoRA that llama.cpp puts beside a model with ``--lora``.

    Args:
        served: of one rank and one scale; see ``serving``.
        kind: of A and B; f32 keeps them as they are.
        shapes: of the base's tensors by their name in a GGUF, to check against.
    Raises:
        AdapterError: parts that llama.cpp takes only merged, or a layer that the base does not have.
    """
    if served.folded or not served.plain:
        rest = ", ".join(f"{count} {what}" for what, count in served.folded.items()) or "no layer at all"
        raise AdapterError(
            f"a GGUF adapter holds A and B of linear layers, and this one has {rest}",
            ("way out", "leave --as-adapter out: it is then merged into the model"),
        )
    keys: dict[str, Value] = {
        "general.type": "adapter",
        "general.name": name,
        "general.file_type": FILE_TYPES[kind],
        "adapter.type": "lora",
        "adapter.lora.alpha": float(served.config["lora_alpha"]),
    }
    names = name_map(arch, config)
    planned = []
    for layer in served.plain:
        target = names(f"{layer}.weight")
        if target is None or target not in shapes:
            raise AdapterError(f"the adapter changes {layer}, which the base does not have as a GGUF of '{arch.name}'")
        a, b = served.tensors[f"{ROOT}{layer}.{A}"], served.tensors[f"{ROOT}{layer}.{B}"]
        if (b.shape[0], a.shape[1]) != shapes[target]:
            found = f"{b.shape[0]} × {a.shape[1]}"
            raise AdapterError(f"{layer}: the adapter is for a weight of {found}, and the base's is {shapes[target]}")
        planned += _pair(arch, config, target, a, b, kind)
    return _write(path, arch, planned, keys, kind=kind)


def _pair(arch: Arch, config: Any, target: str, a: Tensor, b: Tensor, kind: str) -> list[Planned]:
    """A as it is; B with its rows in the order of the weight's. Layers stored as [in, out] have theirs like others."""
    ordered = b.float() if arch.conv1d else laid_out(arch, config, target)(b.float())
    both = ((f"{target}.lora_a", a.float()), (f"{target}.lora_b", ordered))
    # A row of B is as long as the rank, which blocks of 32 seldom divide.
    small = "f16" if kind == "q8_0" else kind
    return [Planned(name, tuple(tensor.shape), small, lambda t=tensor: t) for name, tensor in both]  # type: ignore[misc]


def _write(
    path: Path,
    arch: Arch,
    tensors: Sequence[Planned],
    keys: Mapping[str, Value],
    *,
    kind: str,
    progress: Callable[[int, int], None] | None = None,
) -> Written:
    total, done = sum(map(nbytes, tensors)), 0
    with _appearing(path, total) as temporary:
        writer = library().GGUFWriter(None, arch.name)
        for key, value in keys.items():
            _add(writer, key, value)
        for planned in tensors:
            announce(writer, planned)
        try:
            writer.write_header_to_file(temporary)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for planned in tensors:
                writer.write_tensor_data(encoded(planned))
                done += nbytes(planned)
                if progress is not None:
                    progress(done, total)
        finally:
            writer.close()
    others = tuple(p.name for p in tensors if len(p.shape) > 1 and p.kind != kind)
    return Written(len(tensors), total, others)


def _add(writer: Any, key: str, value: Value) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif key.endswith("precompiled_charsmap"):
        writer.add_array(key, bytes(value))
    elif value or key.endswith("merges"):
        # The library takes an empty list for none at all, and llama.cpp refuses byte-level BPE without one.
        writer.add_array(key, value or [""])


@contextlib.contextmanager
def _appearing(path: Path, needed: int) -> Iterator[Path]:
    """A file beside ``path`` that takes its name when the block ends well, and is gone otherwise, its folder too."""
    if path.exists():
        raise OutputError(f"{path} is there already", ("way out", "another --out, or remove it"))
    new = not path.parent.exists()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with writing(path.parent, needed=needed):
            path.parent.mkdir(parents=True, exist_ok=True)
            require_space(path.parent, needed)
        yield temporary
        with writing(path.parent, needed=needed):
            sync(temporary)
            temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)
        if new and not path.exists():
            with contextlib.suppress(OSError):  # something else was put there meanwhile
                path.parent.rmdir()


def read_keys(path: Path) -> tuple[dict[str, Any], list[Any]]:
    """``(keys, tensors)`` of a file, tensors as the library's reader has them.

    Raises:
        ModelError: no GGUF, or one that is cut short.
    """
    try:
        reader = library().GGUFReader(path)
        keys = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
        return keys, list(reader.tensors)
    except (ValueError, IndexError, OSError, KeyError) as error:
        raise ModelError(f"{path} can't be read as a GGUF: {error}", ("likely", "a copy cut short")) from None
