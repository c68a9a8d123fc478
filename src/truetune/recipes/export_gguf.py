"""``truetune export --to gguf`` and ``--to ollama``: files for llama.cpp, and the words that go with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from truetune.checkpoint.atomic import write_text
from truetune.checkpoint.tensors import open_index
from truetune.config.export import ExportConfig
from truetune.data.template import Template, with_default_system
from truetune.errors import ModelError, OutputError
from truetune.export import gguf, gguf_tensors, ollama
from truetune.export.gguf_arch import Arch, Value, arch_of, hyperparameters
from truetune.export.gguf_tokenizer import Specials, left_out, tokenizer_keys
from truetune.export.new_folder import check_out
from truetune.export.serving import serving
from truetune.models import load
from truetune.models.tokenizer import ChatTokenizer
from truetune.recipes.export_source import Source, merged_folder, template_of
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
    arch_of(load.load_config(str(base)))  # an architecture that can't be written is refused before any merge
    with merged_folder(config, source, out, screen) as folder:
        tokenizer = ChatTokenizer.load(str(folder))
        template = template_of(config, source, tokenizer)
        made: dict[str, Any] = {"out": str(out)}
        # Its Modelfile may turn out impossible, and that is known before gigabytes are written.
        words = _modelfile(config, source, tokenizer, template, screen) if config.to == "ollama" else None
        if config.as_adapter:
            path = out if single else out / "adapter.gguf"
            made |= {"adapter": str(path), **_write_adapter(config, source, folder, path, screen)}
        if not config.as_adapter or config.to == "ollama":
            path = out if single else out / "model.gguf"
            made |= {"model": str(path), **_write_model(config, source, folder, path, tokenizer, template, screen)}
    if words is not None:
        write_text(out / "Modelfile", words)
        screen.note(f"ollama create NAME -f {out / 'Modelfile'}")
        made["modelfile"] = str(out / "Modelfile")
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
    system = source.card.get("system")
    words = with_default_system(template.source, system) if template else None
    core = _core(tokenizer)
    keys |= tokenizer_keys(core, rows, _specials(tokenizer, source), words)
    if changes := left_out(core):
        screen.warn(f"the tokenizer changes a text before it cuts it ({'; '.join(changes)}), and llama.cpp does not: "
                    "texts that this concerns, such as ones with blanks in a row, become other tokens")  # fmt: skip
    screen.say("gguf", f"{source.name} → {path}: {arch.name}, {kind}")
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
    screen.say("done", f"{path}: {written.nbytes / 1e6:,.1f} MB, {len(served.plain)} layers of {arch.name}")
    return {"arch": arch.name, "layers": len(served.plain), "bytes": written.nbytes}


def _tell_of_types(written: gguf.Written, kind: str, screen: Screen) -> None:
    if kind == "q8_0" and (odd := [name for name in written.others if not name.endswith("position_embd.weight")]):
        screen.note(f"{len(odd)} matrices are f16: their rows are no multiple of 32, as q8_0 needs")


def _core(tokenizer: ChatTokenizer) -> dict[str, Any]:
    """``tokenizer.json``, of the tokenizer as it is now."""
    backend = getattr(tokenizer.hf, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            "the tokenizer is no fast one, and only these can be written as a GGUF",
            ("expected", "a tokenizer.json beside the weights"),
        )
    found: dict[str, Any] = json.loads(backend.to_str())
    return found


def _specials(tokenizer: ChatTokenizer, source: Source) -> Specials:
    hf = tokenizer.hf
    framed = hf("a", add_special_tokens=True)["input_ids"]
    return Specials(
        bos=hf.bos_token_id,
        eos=hf.eos_token_id,
        unknown=hf.unk_token_id,
        pad=hf.pad_token_id,
        adds_bos=bool(tokenizer.bos_token),
        adds_eos=hf.eos_token_id is not None and framed[-1:] == [hf.eos_token_id],
        stops=_stops(tokenizer, source),
    )


def _stops(tokenizer: ChatTokenizer, source: Source) -> list[int]:
    """What ends an answer: what was trained to, and the tokenizer's own."""
    return list(dict.fromkeys([*source.card.get("stop_ids", ()), *sorted(tokenizer.stop_ids)]))


def _name(source: Source) -> str:
    return Path(source.name).name or source.name


def _modelfile(
    config: ExportConfig, source: Source, tokenizer: ChatTokenizer, template: Template | None, screen: Screen
) -> str:
    """The Modelfile's text.

    Raises:
        TemplateError: a template that can't be said in Ollama's language.
    """
    system = config.system if config.system is not None else source.card.get("system")
    go = ollama.go_template(template, tokenizer) if template else ollama.BARE
    for remark in go.remarks:
        screen.note(remark)
    stops = [tokenizer.decode([number]) for number in _stops(tokenizer, source)]
    adapter = "./adapter.gguf" if config.as_adapter else None
    return ollama.modelfile(go, "./model.gguf", adapter=adapter, system=system, stops=stops)
