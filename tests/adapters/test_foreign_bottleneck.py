"""AdapterHub's bottlenecks: files as its library writes them, against its formula stated anew with hooks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from families import FAMILIES, distance, logits, perturb
from method_checks import CLOSE, base
from truetune.adapters import files, foreign
from truetune.adapters.bank import Bank
from truetune.adapters.inject import adapters, attach, detach
from truetune.config.other_methods import Bottleneck
from truetune.errors import AdapterError
from virtual_checks import check, same_step, step

SEQ_BN: dict[str, Any] = {
    "adapter_residual_before_ln": False, "cross_adapter": False, "dropout": 0.0, "factorized_phm_W": True,
    "factorized_phm_rule": False, "hypercomplex_nonlinearity": "glorot-uniform", "init_weights": "bert",
    "init_weights_seed": None, "inv_adapter": None, "inv_adapter_reduction_factor": None, "is_parallel": False,
    "learn_phm": True, "leave_out": [], "ln_after": False, "ln_before": False, "mh_adapter": False,
    "non_linearity": "relu", "original_ln_after": True, "original_ln_before": True, "output_adapter": True,
    "phm_bias": True, "phm_c_init": "normal", "phm_dim": 4, "phm_init_range": 0.0001, "phm_layer": False,
    "phm_rank": 1, "reduction_factor": 4, "residual_before_ln": True, "scaling": 1.0, "shared_W_phm": False,
    "shared_phm_rule": True, "stochastic_depth": 0.0, "use_gating": False,
}  # fmt: skip
DOUBLE = {"original_ln_before": False, "mh_adapter": True, "non_linearity": "swish"}
PARALLEL = {"original_ln_before": False, "is_parallel": True, "scaling": 4.0, "init_weights": "mam_adapter"}
STREAM = Bottleneck(reduction=4.0, adapter_reads="stream")


def written(folder: Path, *, layers: str = "model.layers", **changes: Any) -> tuple[Path, dict[str, Tensor]]:
    """A folder as the library writes it, and its tensors."""
    config = {"config": SEQ_BN | changes, "hidden_size": 32, "name": "task", "version": "adapters.1.3.0"}
    draws, tensors = torch.Generator().manual_seed(1), dict[str, Tensor]()
    for number in range(2):
        for place in ("attention", "output") if changes.get("mh_adapter") else ("output",):
            stem = f"{layers}.{number}.{place}_adapters.adapters.task"
            for name, shape in (("adapter_down.0", (8, 32)), ("adapter_up", (32, 8))):
                tensors[f"{stem}.{name}.weight"] = torch.randn(shape, generator=draws) * 0.3
                tensors[f"{stem}.{name}.bias"] = torch.randn(shape[:1], generator=draws) * 0.3
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    torch.save(tensors, folder / "pytorch_adapter.bin")
    return folder, tensors


def restated(model: Any, tensors: dict[str, Tensor], config: dict[str, Any]) -> Tensor:
    """The logits by the library's ``pre_forward``, ``forward`` and ``post_forward`` for a layer norm that is None."""
    act: Callable[[Tensor], Tensor] = {"relu": F.relu, "swish": F.silu, "gelu": F.gelu}[config["non_linearity"]]
    handles, stream = [], dict[str, Tensor]()

    def net(stem: str, x: Tensor) -> Tensor:
        inner = act(F.linear(x, tensors[f"{stem}.adapter_down.0.weight"], tensors[f"{stem}.adapter_down.0.bias"]))
        up = F.linear(inner, tensors[f"{stem}.adapter_up.weight"], tensors[f"{stem}.adapter_up.bias"])
        return up * config["scaling"]

    def placed(stem: str, part: Any, norm: Any) -> None:
        handles.append(norm.register_forward_pre_hook(lambda _, args: stream.update({stem: args[0]})))

        def behind(_: Any, args: Any, output: Any) -> Any:
            f, h = (output[0] if isinstance(output, tuple) else output), stream[stem]
            read = h if config["is_parallel"] else f + h if config["original_ln_before"] else f
            y = f + net(stem, read)
            return (y, *output[1:]) if isinstance(output, tuple) else y

        handles.append(part.register_forward_hook(behind))

    for number, layer in enumerate(model.model.layers):
        placed(f"model.layers.{number}.output_adapters.adapters.task", layer.mlp, layer.post_attention_layernorm)
        if config["mh_adapter"]:
            stem = f"model.layers.{number}.attention_adapters.adapters.task"
            placed(stem, layer.self_attn, layer.input_layernorm)
    found = logits(model)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize(
    ("changes", "settings"),
    [
        ({}, ("pfeiffer", "relu", "stream", 1.0)),
        (DOUBLE, ("houlsby", "silu", "part", 1.0)),
        (DOUBLE | {"original_ln_before": True, "reduction_factor": {"default": 4}}, ("houlsby", "silu", "stream", 1.0)),
        (PARALLEL, ("parallel", "relu", "stream", 4.0)),
        ({"original_ln_before": False, "non_linearity": "gelu"}, ("pfeiffer", "gelu", "part", 1.0)),
        ({"original_ln_after": False, "residual_before_ln": False}, ("pfeiffer", "relu", "stream", 1.0)),
    ],
    ids=["seq_bn", "double_seq_bn", "double that reads the sum", "par_bn", "before the sum", "residual once"],
)
def test_a_file_computes_the_librarys_formula(changes: Any, settings: tuple[Any, ...], tmp_path: Path) -> None:
    folder, tensors = written(tmp_path / "hub", **changes)
    wanted = restated(FAMILIES["llama"].make(), tensors, SEQ_BN | changes)
    model = FAMILIES["llama"].make()
    before = logits(model)
    foreign.load(model, folder)
    assert distance(logits(model), wanted) <= CLOSE
    assert distance(logits(model), before) > 1e-2
    read = foreign.read(folder / "pytorch_adapter.bin", FAMILIES["llama"].make()).settings
    assert isinstance(read, Bottleneck)
    assert (read.placement, read.activation, read.adapter_reads, read.adapter_scale) == settings
    files.save(model, tmp_path / "ours", base=None)
    again = FAMILIES["llama"].make()
    files.load(again, files.read(tmp_path / "ours"))
    assert torch.equal(logits(again), logits(model))
    detach(model)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"ln_before": True}, "ln_before = True"),
        ({"inv_adapter": "nice"}, "inv_adapter = 'nice'"),
        ({"leave_out": [0]}, r"leave_out = \[0\]"),
        ({"phm_layer": True}, "phm_layer = True"),
        ({"scaling": "learned"}, "scaling = 'learned'"),
        ({"reduction_factor": {"0": 4, "default": 8}}, "reduction_factor = "),
        ({"non_linearity": "gelu_new"}, "non_linearity = 'gelu_new'"),
        ({"use_gating": True}, "use_gating = True"),
        ({"mh_adapter": True, "output_adapter": False}, "mh_adapter = True"),
        ({"original_ln_before": False, "original_ln_after": False}, "original_ln_after = False"),
        ({"residual_before_ln": False}, "original_ln_after = True"),
        ({"architecture": "prefix_tuning"}, "architecture = 'prefix_tuning'"),
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(changes: dict[str, Any], field: str, tmp_path: Path) -> None:
    folder, _ = written(tmp_path / "hub", **changes)
    with pytest.raises(AdapterError, match=field):
        foreign.load(FAMILIES["llama"].make(), folder)


def test_other_tensors_and_other_layers_are_refused(tmp_path: Path) -> None:
    folder, tensors = written(tmp_path / "hub")
    model = FAMILIES["llama"].make()
    torch.save(tensors | {"heads.task.weight": torch.zeros(2)}, folder / "pytorch_adapter.bin")
    with pytest.raises(AdapterError, match=r"heads\.task\.weight"):
        foreign.load(model, folder)
    torch.save(dict([*tensors.items()][:-1]), folder / "pytorch_adapter.bin")
    with pytest.raises(AdapterError, match="missing"):
        foreign.load(model, folder)
    assert not list(adapters(model))
    (folder / "pytorch_adapter.bin").unlink()
    with pytest.raises(AdapterError, match=r"has no pytorch_adapter\.bin"):
        foreign.load(model, folder)


def test_files_without_a_version_mean_another_gelu(tmp_path: Path) -> None:
    folder, _ = written(tmp_path / "hub", non_linearity="gelu")
    held = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    del held["version"]
    (folder / "adapter_config.json").write_text(json.dumps(held), encoding="utf-8")
    with pytest.raises(AdapterError, match="non_linearity = 'gelu_new'"):
        foreign.load(FAMILIES["llama"].make(), folder)


@pytest.mark.parametrize(("placement", "name"), [("houlsby", "gpt2"), ("pfeiffer", "llama"), ("parallel", "llama")])
def test_reading_the_stream_it_learns_and_generates_alike(placement: Any, name: str, tmp_path: Path) -> None:
    check(name, "float32", STREAM.model_copy(update={"placement": placement}), tmp_path, lr=0.02)


@pytest.mark.parametrize("placement", ["houlsby", "parallel"])
def test_packed_and_recomputed_steps_are_the_same_step(placement: Any) -> None:
    model = base("llama")
    attach(model, STREAM.model_copy(update={"placement": placement}))
    perturb(model)
    padded = step(model, packing=False)
    assert same_step(step(model, packing=True), padded)
    assert same_step(step(model, packing=True, recompute="full"), padded)


def test_a_family_whose_stream_is_not_known_is_refused() -> None:
    with pytest.raises(AdapterError, match="--adapter-reads stream: bloom is not built"):
        attach(FAMILIES["bloom"].make(), STREAM)


def test_by_name_it_comes_and_goes(tmp_path: Path) -> None:
    folder, _ = written(tmp_path / "hub")
    model, alone = FAMILIES["llama"].make(), FAMILIES["llama"].make()
    before = logits(model)
    foreign.load(alone, folder)
    files.save(alone, tmp_path / "ours", base=None)
    bank = Bank(model)
    bank.add("one", files.read(tmp_path / "ours"))
    bank.use("one")
    assert torch.equal(logits(model), logits(alone))
    bank.use(None)
    assert torch.equal(logits(model), before)
