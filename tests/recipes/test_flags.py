"""No dead flags: for every setting, changing it changes the run, its files, its plan, or is refused.

A table says for each field which settings to compare and where the difference must show. A field without a row fails.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from truetune.config.generate import GenerateConfig
from truetune.config.merge import MergeConfig
from truetune.config.methods import METHODS
from truetune.config.options import Options, option
from truetune.config.preview import PreviewConfig
from truetune.config.resolve import resolve
from truetune.config.sft import PretrainConfig, SFTConfig
from truetune.errors import TruetuneError
from truetune.recipes import generate, merge, pretrain, preview, sft

Seen = dict[str, Any]
Look = Callable[[Mapping[str, Any]], Seen]


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, alpaca_file: Path, make_tiny: Callable[..., Path]
) -> dict[str, str]:
    """The names that the tables use: models, data files and an adapter."""
    folder = tmp_path_factory.mktemp("place")
    rows = [json.loads(line) for line in alpaca_file.read_text(encoding="utf-8").splitlines()]

    def lines(name: str, content: list[dict[str, Any]]) -> str:
        path = folder / name
        path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
        return str(path)

    said = (("system", "Be brief."), ("user", "Add."), ("assistant", "<think>Hm.</think>It is 2."))
    chats = [{"messages": [{"role": role, "content": text + "!" * n} for role, text in said]} for n in range(4)]
    made = {
        "MODEL": str(tiny_model),
        "OTHER": str(make_tiny(folder / "other", rope_theta=100.0, num_hidden_layers=1)),
        "ROWS": str(alpaca_file),
        "FEW": lines("few.jsonl", rows[:5]),
        "SCHEMA": lines("schema.json", [{"type": "array", "items": {"type": "boolean"}}]),
        "BAD": lines("bad.jsonl", [*rows[:8], {"instruction": "only"}]),
        "TWO_WAYS": lines("two_ways.jsonl", [row | {"text": "a b c"} for row in rows]),
        "TEXT": lines("text.jsonl", [{"text": "the quick brown fox " * n} for n in range(2, 12)]),
        "MORE": lines("more.jsonl", [{"text": "jumps over " * n} for n in range(2, 12)]),
        "BAD_TEXT": lines("bad_text.jsonl", [{"text": "the quick brown fox " * 9}, {"text": ""}]),
        "CHATS": lines("chats.jsonl", [chat | {"tools": []} for chat in chats]),
        "TOOLS": lines("tools.jsonl", [chat | {"tools": [{"name": "clock"}]} for chat in chats]),
        "REGISTRY": str(folder / "data.yaml"),
        "OUT": str(folder / "free"),
    }
    (folder / "data.yaml").write_text("mine: few.jsonl\n", encoding="utf-8")
    for name, seed in (("ADAPTER", 1), ("ADAPTER_2", 2)):
        out = folder / name.lower()
        settings = {"model": made["MODEL"], "data": made["ROWS"], "max_steps": 2, "lr": 0.1, "rank": 2, "seed": seed}
        made[name] = sft.run(resolve(SFTConfig, file=None, flags=settings | {"out": str(out)}))["result"]
    made["RUN"] = str(folder / "adapter")
    return made


def filled(settings: Mapping[str, Any], place: Mapping[str, str]) -> dict[str, Any]:
    def real(value: Any) -> Any:
        if isinstance(value, list):
            return [real(item) for item in value]
        return place.get(value, value) if isinstance(value, str) else value

    return {key: real(value) for key, value in settings.items()}


def look_at_run(command: Any, config: type[Options], folder: Path, settings: Mapping[str, Any]) -> Seen:
    """Everything a run leaves that is not a measurement of time or memory."""
    out = Path(settings.get("out", folder))
    before = set(out.rglob("*")) if out.exists() else set()
    try:
        result = command.run(resolve(config, file=None, flags={"out": str(out), **settings}))
    except TruetuneError as error:
        return {"refused": error.message}
    steps = {"tok_s", "peak_mb"}
    log = out / "log.jsonl"
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.is_file() else []
    weights = [path for path in (out / "adapter", out / "model") if path.is_dir()]
    tensors = load_file(next(weights[0].glob("*.safetensors"))) if weights else {}
    card = json.loads((weights[0] / "truetune.json").read_text(encoding="utf-8")) if weights else {}
    report = out / "data" / "report.json"
    return {
        "refused": None,
        "where": None if out == folder else str(out),
        "files": sorted(str(p.relative_to(out)) for p in set(out.rglob("*")) - before),
        "log": [{k: v for k, v in row.items() if k not in steps} for row in rows],
        "tensors": {name: tensor.float().sum().item() for name, tensor in tensors.items()},
        "shapes": {name: list(tensor.shape) for name, tensor in tensors.items()},
        "facts": card.get("facts"),
        "report": json.loads(report.read_text(encoding="utf-8")) if report.is_file() else None,
        "plan": {k: v for k, v in result.items() if k in ("steps", "tokens", "trainable_parameters")},
    }


HELD = {"val_data": "FEW"}
WILD = {**HELD, "eval_every": 1, "lr": 0.1, "schedule": "constant", "max_steps": 4}
PRUNED = {"method": "adalora", "rank": 4, "target_rank": 1, "prune_every": 1, "max_steps": 10, "lr": 0.1}
TRAIN: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    # field: (settings of both, the change, where it must show)
    "model": ({}, {"model": "OTHER"}, "shapes"),
    "revision": ({}, {"revision": "main"}, "refused"),
    "dtype": ({}, {"dtype": "bfloat16"}, "log"),
    "device": ({}, {"device": "cuda"}, "refused"),
    "max_memory": ({}, {"max_memory": "5MB"}, "refused"),
    "max_length": ({"on_overlong": "drop"}, {"max_length": 50}, "report"),
    "packing": ({}, {"packing": False}, "report"),
    "val_split": ({}, {"val_split": 0.5}, "report"),
    "val_data": ({}, HELD, "log"),
    "max_bad_rows": ({"data": "BAD"}, {"max_bad_rows": 1}, "refused"),
    "data": ({}, {"data": "FEW"}, "report"),
    "registry": ({"data": "mine"}, {"registry": "REGISTRY"}, "refused"),
    "columns": ({}, {"columns": ["output=instruction", "instruction=output"]}, "report"),
    "fim_rate": ({}, {"fim_rate": 0.5}, "refused"),
    "method": ({}, {"method": "full"}, "files"),
    "adapter": ({}, {"adapter": "ADAPTER"}, "log"),
    "on_top_of": ({}, {"on_top_of": "ADAPTER"}, "log"),
    "rank": ({}, {"rank": 3}, "shapes"),
    "alpha": ({}, {"alpha": 3.0}, "log"),
    "dropout": ({}, {"dropout": 0.5}, "log"),
    "targets": ({}, {"targets": ["q_proj"]}, "shapes"),
    "use_rslora": ({}, {"use_rslora": True}, "log"),
    "trainable": ({}, {"trainable": ["norm"]}, "shapes"),
    "token_rows": ({}, {"token_rows": [5, 6]}, "shapes"),
    "new_tokens": ({}, {"new_tokens": ["It is"]}, "shapes"),
    "quant": ({}, {"quant": "nf4"}, "log"),
    "double_quant": ({"quant": "nf4"}, {"double_quant": True}, "log"),
    "quant_skip": ({"quant": "nf4"}, {"quant_skip": ["q_proj"]}, "log"),
    "exclude": ({}, {"exclude": ["q_proj"]}, "shapes"),
    "layers": ({}, {"layers": [0]}, "shapes"),
    "init": ({}, {"init": "gaussian"}, "tensors"),
    "rank_pattern": ({}, {"rank_pattern": ["q_proj=3"]}, "shapes"),
    "alpha_pattern": ({}, {"alpha_pattern": ["q_proj=3"]}, "tensors"),
    "lora_bias": ({}, {"lora_bias": True}, "shapes"),
    "slices": ({}, {"slices": ["c_attn=q,v"]}, "refused"),
    "target_parameters": ({}, {"target_parameters": ["experts.down_proj"]}, "refused"),
    "dora_dropout": ({"method": "dora", "dropout": 0.5}, {"dora_dropout": "low-rank"}, "log"),
    "target_rank": (PRUNED, {"target_rank": 3}, "tensors"),
    "prune_from": (PRUNED, {"prune_from": 0.5}, "tensors"),
    "prune_until": (PRUNED, {"prune_until": 0.9}, "tensors"),
    "prune_every": (PRUNED, {"prune_every": 3}, "tensors"),
    "orthogonality": (PRUNED, {"orthogonality": 5.0}, "tensors"),
    "d_initial": ({"method": "vera"}, {"d_initial": 0.7}, "tensors"),
    "projection_seed": ({"method": "vera"}, {"projection_seed": 1}, "log"),
    "save_projection": ({"method": "vera"}, {"save_projection": False}, "shapes"),
    "feedforward": ({"method": "ia3", "targets": ["k_proj", "down_proj"]}, {"feedforward": ["down_proj"]}, "shapes"),
    "virtual_tokens": ({"method": "prompt"}, {"virtual_tokens": 3}, "shapes"),
    "prompt_text": ({"method": "prompt"}, {"prompt_text": "the quick"}, "tensors"),
    "encoder": ({"method": "ptuning"}, {"encoder": "lstm"}, "tensors"),
    "encoder_hidden": ({"method": "ptuning"}, {"encoder_hidden": 3}, "tensors"),
    "projection": ({"method": "prefix"}, {"projection": True}, "tensors"),
    "adapter_length": ({"method": "llama-adapter", "adapter_layers": 1}, {"adapter_length": 3}, "shapes"),
    "adapter_layers": ({"method": "llama-adapter", "adapter_layers": 1}, {"adapter_layers": 2}, "shapes"),
    "gates": ({"method": "llama-adapter", "adapter_layers": 1}, {"gates": "head"}, "shapes"),
    "llama_adapter_v2": ({"method": "llama-adapter", "adapter_layers": 1}, {"llama_adapter_v2": True}, "shapes"),
    "mixed_maps": ({"method": "llama-adapter", "adapter_layers": 1}, {"mixed_maps": True}, "tensors"),
    "scaled_head": (
        {"method": "llama-adapter", "adapter_layers": 1, "llama_adapter_v2": True},
        {"scaled_head": True},
        "shapes",
    ),
    "adapter_reads": ({"method": "bottleneck"}, {"adapter_reads": "stream"}, "tensors"),
    "placement": ({"method": "bottleneck"}, {"placement": "houlsby"}, "shapes"),
    "reduction": ({"method": "bottleneck"}, {"reduction": 4.0}, "shapes"),
    "activation": ({"method": "bottleneck"}, {"activation": "silu"}, "tensors"),
    "adapter_scale": ({"method": "bottleneck"}, {"adapter_scale": 3.0}, "tensors"),
    "train_layers": ({"method": "freeze", "train_layers": 1, "dry_run": True}, {"train_layers": 2}, "plan"),
    "train_pattern": ({"method": "freeze", "dry_run": True}, {"train_pattern": "norm"}, "plan"),
    "lisa_layers": ({"method": "lisa", "lisa_layers": 1}, {"lisa_layers": 2}, "tensors"),
    "lisa_every": ({"method": "lisa", "lisa_layers": 1}, {"lisa_every": 1}, "tensors"),
    "lora_plus_ratio": ({}, {"lora_plus_ratio": 16.0}, "tensors"),
    "neftune_alpha": ({}, {"neftune_alpha": 5.0}, "log"),
    "label_smoothing": ({}, {"label_smoothing": 0.1}, "log"),
    "lr": ({}, {"lr": 1e-3}, "log"),
    "schedule": ({}, {"schedule": "constant"}, "log"),
    "warmup": ({}, {"warmup": 2}, "log"),
    "optim": ({}, {"optim": "lion"}, "tensors"),
    "weight_decay": ({}, {"weight_decay": 0.5}, "tensors"),
    "clip": ({}, {"clip": 1e-3}, "tensors"),
    "epochs": ({"max_steps": None, "dry_run": True}, {"epochs": 1.0}, "plan"),
    "max_steps": ({"dry_run": True}, {"max_steps": 1}, "plan"),
    "batch_size": ({}, {"batch_size": 3}, "log"),
    # Another cut sums in another order: the same to six digits, not to the last bit.
    "micro_tokens": ({}, {"micro_tokens": 64}, "log"),
    "recompute": ({}, {"recompute": "full"}, "facts"),
    "seed": ({}, {"seed": 1}, "tensors"),
    "out": ({}, {"out": "OUT"}, "where"),
    "eval_every": (HELD, {"eval_every": 1}, "log"),
    "save_every": ({}, {"save_every": 2}, "files"),
    "keep": ({"save_every": 1}, {"keep": 1}, "files"),
    "select": (WILD, {"select": "best"}, "tensors"),
    "resume": ({"out": "RUN", "max_steps": 2}, {"resume": "nowhere"}, "refused"),
    "verify": ({}, {"verify": True}, "files"),
    "verify_prompts": ({}, {"verify_prompts": 0}, "files"),
    "log_every": ({}, {"log_every": 2}, "log"),
    "dry_run": ({}, {"dry_run": True}, "files"),
}
SFT = TRAIN | {
    "format": ({"data": "TWO_WAYS"}, {"format": "text"}, "report"),
    "template": ({}, {"template": "alpaca"}, "report"),
    "system": ({}, {"system": "Be short."}, "report"),
    "on_overlong": ({"max_length": 65}, {"on_overlong": "truncate"}, "report"),
    "train_on": ({}, {"train_on": "all"}, "report"),
    "thinking": ({"data": "CHATS"}, {"thinking": "drop"}, "report"),
    "tools": ({"data": "TOOLS"}, {"tools": "drop"}, "refused"),
    "text_blocks": ({"data": "TEXT", "max_length": 256}, {"text_blocks": True}, "report"),
    "system_messages": ({"data": "CHATS"}, {"system_messages": "drop"}, "report"),
}
PRETRAIN = TRAIN | {
    "max_length": ({}, {"max_length": 50}, "report"),
    "val_data": ({}, {"val_data": "MORE"}, "log"),
    "data": ({}, {"data": "MORE"}, "report"),
    "max_bad_rows": ({"data": "BAD_TEXT"}, {"max_bad_rows": 1}, "refused"),
    "method": ({}, {"method": "full"}, "files"),
    "eval_every": ({"val_data": "MORE"}, {"eval_every": 1}, "log"),
    "select": (WILD | {"val_data": "MORE"}, {"select": "best"}, "tensors"),
}
SFT_BASE = {"model": "MODEL", "data": "ROWS", "max_steps": 3, "batch_size": 4, "rank": 2, "lr": 0.01}
PRETRAIN_BASE = SFT_BASE | {"data": "TEXT", "method": "lora", "max_length": 100}
# What pretrain shares with sft to the last line is tried there; here is what concerns its data, and its own default.
PRETRAIN_TRIED = ("max_length", "val_split", "val_data", "data", "max_bad_rows", "method", "eval_every")
GENERATE: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "model": ({}, {"model": "OTHER"}, "text"),
    "revision": ({}, {"revision": "main"}, "refused"),
    "adapter": ({}, {"adapter": "ADAPTER"}, "text"),
    "dtype": ({}, {"dtype": "float16"}, "refused"),
    "device": ({}, {"device": "cuda"}, "refused"),
    "allow_other_base": ({"model": "COPY", "adapter": "ADAPTER"}, {"allow_other_base": True}, "refused"),
    "allow_mismatch": ({"model": "COPY", "adapter": "ADAPTER"}, {"allow_mismatch": "base"}, "refused"),
    "prompt": ({}, {"prompt": "Another one"}, "text"),
    "system": ({}, {"system": "Be short."}, "prompt_tokens"),
    "template": ({}, {"template": "none"}, "prompt_tokens"),
    "max_new_tokens": ({}, {"max_new_tokens": 3}, "new_tokens"),
    "temperature": ({}, {"temperature": 3.0}, "text"),
    "top_p": ({"temperature": 3.0}, {"top_p": 0.01}, "text"),
    "seed": ({"temperature": 3.0}, {"seed": 1}, "text"),
    "top_k": ({"temperature": 3.0}, {"top_k": 1}, "text"),
    "min_p": ({"temperature": 3.0}, {"min_p": 1.0}, "text"),
    "repetition_penalty": ({}, {"repetition_penalty": 0.001}, "text"),
    "presence_penalty": ({}, {"presence_penalty": -99.0}, "text"),
    "frequency_penalty": ({}, {"frequency_penalty": -99.0}, "text"),
    "stop": ({}, {"stop": [*"abcdefghijklmnopqrstuvwxyz "]}, "stopped"),
    "input": ({}, {"input": "FEW"}, "refused"),
    "output": ({}, {"output": "OUT"}, "refused"),
    "json_schema": ({}, {"json_schema": "SCHEMA"}, "text"),
    "rows": ({}, {"rows": -1}, "refused"),
    "quant": ({}, {"quant": "fp4"}, "text"),
    "double_quant": ({"quant": "int8"}, {"double_quant": True}, "refused"),
    "quant_skip": ({"quant": "nf4"}, {"quant_skip": ["x"]}, "refused"),
}
SEVERAL = {"adapter": ["ADAPTER", "ADAPTER_2"]}
MERGE: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "model": ({}, {"model": "COPY"}, "refused"),
    "revision": ({}, {"revision": "main"}, "refused"),
    "adapter": ({}, {"adapter": "ADAPTER_2"}, "tensors"),
    "to": ({}, {"to": "adapter"}, "files"),
    "combine": (SEVERAL, {"combine": "linear"}, "tensors"),
    "rank": (SEVERAL | {"combine": "svd"}, {"rank": 1}, "tensors"),
    "density": (SEVERAL | {"combine": "ties"}, {"density": 0.1}, "tensors"),
    "seed": (SEVERAL | {"combine": "dare-linear"}, {"seed": 1}, "tensors"),
    "out": ({}, {"out": "OUT_2"}, "where"),
    "max_shard_gb": ({}, {"max_shard_gb": 2e-5}, "files"),
    "allow_other_base": ({"model": "COPY"}, {"allow_other_base": True}, "refused"),
    "allow_mismatch": ({"model": "COPY"}, {"allow_mismatch": "base"}, "refused"),
    "verify": ({}, {"verify": True}, "verdict"),
    "onto": ({}, {"onto": "dequantized"}, "refused"),
    "quant": ({}, {"quant": "nf4"}, "tensors"),
    "double_quant": ({"quant": "nf4"}, {"double_quant": True}, "tensors"),
    "quant_skip": ({"quant": "nf4"}, {"quant_skip": ["q_proj"]}, "tensors"),
}


def without_row(config: type[Options], table: Mapping[str, Any]) -> list[str]:
    return sorted(set(config.model_fields) ^ set(table))


@pytest.mark.parametrize(
    ("config", "table"),
    [(SFTConfig, SFT), (PretrainConfig, PRETRAIN), (GenerateConfig, GENERATE), (MergeConfig, MERGE)],
)
def test_every_field_has_a_row(config: type[Options], table: Mapping[str, Any]) -> None:
    assert without_row(config, table) == []


def test_a_planted_field_is_missed() -> None:
    class Planted(SFTConfig):
        dead: int = option(0, help="does nothing", group="training")

    assert without_row(Planted, SFT) == ["dead"]


def compare(row: tuple[dict[str, Any], dict[str, Any], str], base: Mapping[str, Any], look: Look) -> None:
    """The observation that must differ does; and where it is no refusal, nothing is refused."""
    both, change, where = row
    halves = []
    for settings in ({**base, **both}, {**base, **both, **change}):
        if "rank" not in METHODS[settings.get("method", "lora")].config.model_fields:
            settings.pop("rank", None)
        halves.append(look(settings))
    before, after = halves
    if where != "refused":
        assert (before["refused"], after["refused"]) == (None, None)
    assert before[where] != after[where]


@pytest.fixture(scope="module")
def look_at_sft(place: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Look:
    """Most rows share their first half: it is run once."""
    seen: dict[str, Seen] = {}

    def look(settings: Mapping[str, Any]) -> Seen:
        key = json.dumps(settings, sort_keys=True)
        if key not in seen:
            seen[key] = look_at_run(sft, SFTConfig, tmp_path_factory.mktemp("run") / "out", filled(settings, place))
        return seen[key]

    return look


@pytest.mark.parametrize("field", SFT)
def test_every_sft_setting_does_something(field: str, look_at_sft: Look) -> None:
    if field == "device" and torch.cuda.is_available():
        pytest.skip("only a machine without CUDA refuses it")
    compare(SFT[field], SFT_BASE, look_at_sft)


@pytest.mark.parametrize("field", PRETRAIN_TRIED)
def test_every_pretrain_setting_about_data_does_something(field: str, place: dict[str, str], tmp_path: Path) -> None:
    number = iter(range(2))

    def look(settings: Mapping[str, Any]) -> Seen:
        return look_at_run(pretrain, PretrainConfig, tmp_path / str(next(number)), filled(settings, place))

    compare(PRETRAIN[field], PRETRAIN_BASE, look)


def copied(place: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """Another base of the same shape: one weight differs."""
    copy = tmp_path / "copy"
    shutil.copytree(place["MODEL"], copy)
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return place | {"COPY": str(copy), "OUT_2": str(tmp_path / "other-out")}


@pytest.mark.parametrize("field", GENERATE)
def test_every_generate_setting_does_something(field: str, place: dict[str, str], tmp_path: Path) -> None:
    if field in ("device", "dtype") and torch.cuda.is_available():
        pytest.skip("only a machine without CUDA refuses these")
    names = copied(place, tmp_path)
    base = {"model": "MODEL", "prompt": "Add 1 and 2.", "max_new_tokens": 12}

    def look(settings: Mapping[str, Any]) -> Seen:
        try:
            return generate.run(resolve(GenerateConfig, file=None, flags=filled(settings, names))) | {"refused": None}
        except TruetuneError as error:
            return {"refused": error.message}

    compare(GENERATE[field], base, look)


@pytest.mark.parametrize("field", MERGE)
def test_every_merge_setting_does_something(field: str, place: dict[str, str], tmp_path: Path) -> None:
    names = copied(place, tmp_path)
    number = iter(range(2))

    def look(settings: Mapping[str, Any]) -> Seen:
        default = tmp_path / str(next(number))
        ready = {"out": str(default), **filled(settings, names)}
        out = Path(ready["out"])
        try:
            result = merge.run(resolve(MergeConfig, file=None, flags=ready))
        except TruetuneError as error:
            return {"refused": error.message}
        tensors = {k: v.sum().item() for path in out.glob("*.safetensors") for k, v in load_file(path).items()}
        files = sorted(path.name for path in out.iterdir())
        verdict = result.get("verify")
        return {"refused": None, "where": out != default, "files": files, "tensors": tensors, "verdict": verdict}

    compare(MERGE[field], {"model": "MODEL", "adapter": "ADAPTER"}, look)


# What preview shares with sft is tried by sft's rows; here is what those would not show.
PREVIEW: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "model": ({}, {"model": "nowhere"}),
    "seed": ({"batch_size": 4, "micro_tokens": 200}, {"seed": 1}),
    "batch_size": ({"micro_tokens": 150}, {"batch_size": 3}),
    "rows": ({}, {"rows": "2"}),
    "sample": ({}, {"sample": 1}),
    "worst": ({}, {"worst": True}),
    "html": ({}, {"html": "PAGE"}),
}


@pytest.mark.parametrize("field", PreviewConfig.model_fields)
def test_every_preview_setting_does_something(field: str, place: dict[str, str], tmp_path: Path) -> None:
    both, change = PREVIEW.get(field) or SFT[field][:2]
    seen = []
    for settings in ({**both}, {**both, **change}):
        own = {key: value for key, value in settings.items() if key in PreviewConfig.model_fields}
        flags = filled({"model": "MODEL", "data": "ROWS", **own}, place | {"PAGE": str(tmp_path / "page.html")})
        try:
            facts = preview.run(resolve(PreviewConfig, file=None, flags=flags))
        except TruetuneError as error:
            facts = {"refused": error.message}
        seen.append(facts | {"files": [path.name for path in tmp_path.iterdir()]})
    assert seen[0] != seen[1]
