"""What goes with a model, and what is fetched for it."""

from pathlib import Path

from huggingface_hub.utils import filter_repo_objects

from truetune.checkpoint.side_files import FETCHED, NOT_FETCHED, side_files

BELONGS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "merges.txt", "qwen.tiktoken",
    "chat_template.jinja", "additional_chat_templates/tool_use.jinja", "LICENSE", "LICENSE.md", "NOTICE",
    "USE_POLICY.md",
)  # fmt: skip
WEIGHTS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json")
FOREIGN = (
    "README.md", "original/consolidated.00.pth", "original/params.json", "original/tokenizer.model",
    "original/model.safetensors", "consolidated.safetensors", "consolidated.00.pth", "pytorch_model.bin",
    "onnx/model.onnx", "onnx/config.json", "metal/model.safetensors", "model.gguf",
)  # fmt: skip


def test_what_a_merge_keeps_is_what_is_fetched_and_no_weights_come_twice() -> None:
    files = [*BELONGS, *WEIGHTS, *FOREIGN]
    fetched = filter_repo_objects(files, allow_patterns=list(FETCHED), ignore_patterns=list(NOT_FETCHED))
    assert set(fetched) == {*BELONGS, *WEIGHTS}


def test_a_merge_keeps_what_belongs(tmp_path: Path) -> None:
    for name in (*BELONGS, *WEIGHTS, *FOREIGN):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert {path.relative_to(tmp_path).as_posix() for path in side_files(tmp_path)} == set(BELONGS)
