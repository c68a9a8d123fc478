"""``truetune export --to gguf`` and ``--to ollama``: files for llama.cpp, and the words that go with them."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from truetune.checkpoint.atomic import write_text
from truetune.checkpoint.tensors import open_index
from truetune.config.export import ExportConfig
from truetune.data.template import Template
from truetune.errors import OutputError, counted
from truetune.export import gguf, gguf_tensors, modelfile
from truetune.export.gguf_arch import Arch, Value, arch_of, hyperparameters, window_left_out
from truetune.export.gguf_cuts import check_tokenizer, left_out
from truetune.export.new_folder import check_out
from truetune.export.serving import serving
from truetune.models import load
from truetune.models.tokenizer import ChatTokenizer
from truetune.recipes.artefacts import note_artefact
from truetune.recipes.export_source import Source, merged_folder, template_of
from truetune.recipes.gguf_words import core_of, modelfile_of, words_of
from truetune.train.log import Screen


def run(config: ExportConfig, source: Source, screen: Screen) -> dict[str, Any]:
    """Write the model, or with ``--as-adapter`` the adapter alone (ollama: both), and the Modelfile."""
    gguf_tensors.library()
    out = Path(config.out).expanduser()
    single = config.to == "gguf" and out.suffix == ".gguf"
    if single and out.exists():
        raise OutputError(f"{out} is there already", ("way out", "another --out, or remove it"))
    if not single:
        check_out(Path(source.name), out)
    base = load.local_copy(source.name, revision=config.revision)
    with_model = not config.as_adapter or config.to == "ollama"
    arch_of(load.load_config(str(base)))  # what can't be written is refused before any merge
    if with_model:
        check_tokenizer(core_of(ChatTokenizer.load(source.name, revision=config.revision)))
    with merged_folder(config, source, out, screen) as folder:
        tokenizer = ChatTokenizer.load(str(folder))
        template = template_of(config, source, tokenizer)
        made: dict[str, Any] = {"out": str(out)}
        # Its Modelfile may turn out impossible, and that is known before gigabytes are written.
        words = _modelfile(config, source, tokenizer, template, screen) if config.to == "ollama" else None
        with contextlib.ExitStack() as undo:
            if config.as_adapter:
                path = out if single else out / modelfile.ADAPTER
                made |= {"adapter": str(path), **_write_adapter(config, source, folder, path, screen)}
                undo.callback(path.unlink)  # one without the other is nothing that was asked for
            if with_model:
                path = out if single else out / modelfile.MODEL
                made |= {"model": str(path), **_write_model(config, source, folder, path, tokenizer, template, screen)}
            undo.pop_all()
    if config.template == "auto" and config.system is None:  # else it words prompts otherwise on purpose
        note_artefact(source.folder, out if config.to == "ollama" else path)
    if words is not None:
        write_text(out / modelfile.FILE, words)
        screen.note(f"ollama create NAME -f {out / 'Modelfile'}")
        made["modelfile"] = str(out / modelfile.FILE)
    return made


def _write_model(
    config: ExportConfig,
    source: Source,
    folder: Path,
    path: Path,
    tokenizer: ChatTokenizer,
    template: Template | None,
    screen: Screen,
) -> dict[str, Any]:
    model_config = load.load_config(str(folder))
    load.check_dense(source.name, model_config)
    arch, entries = arch_of(model_config), open_index(folder)
    kind = gguf_tensors.kind_of(config.gguf_type, load.checkpoint_dtype(model_config))
    tensors = gguf_tensors.plan(arch, model_config, entries, kind)
    rows = next(p.shape[0] for p in tensors if p.name == "token_embd.weight")
    keys: dict[str, Value] = {
        f"{arch.name}.{key}": value for key, value in hyperparameters(arch, model_config, rows).items()
    }
    keys |= words_of(tokenizer, template, source.card, rows)
    if changes := left_out(core_of(tokenizer), prefixed=bool(keys.get("tokenizer.ggml.add_space_prefix"))):
        screen.warn(f"the tokenizer changes a text before it cuts it ({'; '.join(changes)}), and llama.cpp does not: "
                    "texts that this concerns, such as ones with blanks in a row, become other tokens")  # fmt: skip
    screen.say("gguf", f"{source.name} → {path}: {arch.name}, {kind}")
    if window := window_left_out(arch, model_config):
        screen.warn(f"llama.cpp has no sliding window for {arch.name}: up to {window:,} tokens it computes the same, "
                    "so that is the context length in the file")  # fmt: skip
    with screen.bar("writing") as progress:
        written = gguf.write_model(path, arch, tensors, keys, kind=kind, name=_name(source), progress=progress)
    screen.say("done", f"{path}: {written.nbytes / 1e6:,.1f} MB, {written.tensors} tensors")
    _tell_of_types(written, kind, screen)
    return {"arch": arch.name, "type": kind, "tensors": written.tensors, "bytes": written.nbytes,
            "kept_wider": list(written.others)}  # fmt: skip


def _write_adapter(config: ExportConfig, source: Source, folder: Path, path: Path, screen: Screen) -> dict[str, Any]:
    assert source.file is not None
    model_config = load.load_config(str(folder))
    arch: Arch = arch_of(model_config)
    shapes = {p.name: p.shape for p in gguf_tensors.plan(arch, model_config, open_index(folder), "f32")}
    served = serving(source.file)
    kind = "f32" if config.gguf_type == "auto" else config.gguf_type
    written = gguf.write_adapter(path, arch, model_config, served, kind=kind, name=_name(source), shapes=shapes)
    for change in served.changes:
        screen.note(change)
    screen.say("done", f"{path}: {written.nbytes / 1e6:,.1f} MB, {counted(len(served.plain), 'layer')} of {arch.name}")
    return {"arch": arch.name, "layers": len(served.plain), "bytes": written.nbytes}


def _tell_of_types(written: gguf.Written, kind: str, screen: Screen) -> None:
    if kind == "q8_0" and (odd := [name for name in written.others if not name.endswith("position_embd.weight")]):
        screen.note(f"{len(odd)} matrices are f16: their rows are no multiple of 32, as q8_0 needs")


def _name(source: Source) -> str:
    return Path(source.name).name or source.name


def _modelfile(
    config: ExportConfig, source: Source, tokenizer: ChatTokenizer, template: Template | None, screen: Screen
) -> str:
    system = config.system if config.system is not None else source.card.get("system")
    made, remarks = modelfile_of(tokenizer, template, source.card, system=system, adapter=config.as_adapter)
    for remark in remarks:
        screen.note(remark)
    return made.text()
