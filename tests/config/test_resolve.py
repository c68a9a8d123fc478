"""Defaults, file and flags: who wins, where a value came from, and what a mistake is told."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from truetune.config.generate import GenerateConfig
from truetune.config.lora import LoRA
from truetune.config.resolve import resolve
from truetune.config.sft import PretrainConfig, SFTConfig
from truetune.errors import ConfigError

NEEDED = {"model": "m", "data": ["d.jsonl"]}


def write(folder: Path, text: str) -> str:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def error_of(folder: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(SFTConfig, file=write(folder, text), flags=NEEDED if "model" not in text else {"data": "d.jsonl"})
    return str(caught.value).replace(str(folder), "DIR")


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    made = resolve(SFTConfig, file=write(tmp_path, "rank: 8\nalpha: 4\n"), flags=NEEDED | {"rank": "2"})
    assert (made.config.rank, made.config.alpha, made.config.dropout) == (2, 4.0, 0.0)
    assert [made.sources[name] for name in ("rank", "alpha", "dropout")] == ["flag", "file", "default"]


@pytest.mark.parametrize(
    "text",
    [
        "rank: 8\nlr: 1e-3\n",
        "tuning:\n  rank: 8\ntraining:\n  lr: 1e-3\n",
        "lora-rank: 8\nlearning_rate: 0.001\n",
        "tuning:\n  lora_r: 8\nlearning-rate: 1.0e-3\n",
        "\ufeffrank: 8\r\nlr: 1e-3\r\n",
        "training:\nrank: '8'\nlr: 1e-3\n",  # a heading with nothing under it
    ],
)
def test_keys_may_be_flat_or_nested_and_spelled_as_flags_are(tmp_path: Path, text: str) -> None:
    config = resolve(SFTConfig, file=write(tmp_path, text), flags=NEEDED).config
    assert (config.rank, config.lr) == (8, 1e-3)


def test_one_text_stands_for_a_list_of_one(tmp_path: Path) -> None:
    config = resolve(SFTConfig, file=write(tmp_path, "model: m\ndata: d.jsonl\ntargets: q_proj\n"), flags={}).config
    assert (config.data, config.targets) == (("d.jsonl",), ("q_proj",))


def test_an_empty_file_sets_nothing(tmp_path: Path) -> None:
    assert resolve(SFTConfig, file=write(tmp_path, "# nothing yet\n"), flags=NEEDED).config.rank == 16


def test_an_unknown_key_is_named_with_its_line_and_the_nearest(tmp_path: Path) -> None:
    text = error_of(tmp_path, "rank: 8\ntraining:\n  bach_size: 4\n")
    assert text.startswith("DIR/run.yaml:3: unknown key 'bach_size'; did you mean 'batch_size'?")


def test_all_unknown_and_repeated_keys_are_reported_at_once(tmp_path: Path) -> None:
    text = error_of(tmp_path, "rnk: 8\nalpha: 1\ntuning:\n  lora_alpha: 2\n")
    assert "run.yaml:1: unknown key 'rnk'; did you mean 'rank'?" in text
    assert "run.yaml:4: 'lora_alpha' is set twice, first in DIR/run.yaml:2" in text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rank: many", "DIR/run.yaml:1: --rank: found 'many', expected a whole number"),
        ("\nrank: 2.5", "DIR/run.yaml:2: --rank: found 2.5, expected a whole number"),
        ("rank: true", "--rank: found true, expected a whole number"),
        ("lr: 0", "--lr: found 0, expected more than 0"),
        ("lr: .nan", "--lr: found nan, expected a finite number"),
        ("dropout: 1", "--dropout: found 1, expected less than 1"),
        ("packing: 3", "--packing: found 3, expected true or false"),
        ("seed: -1", "--seed: found -1, expected 0 or more"),
        ("out: 5", "--out: found 5, expected a text"),
        ("targets: []", "--targets: found [], expected at least one value"),
        ("targets: {a: 1}", "--targets: found {'a': 1}, expected a list"),
        ("trainable: [bia]", "--trainable: found 'bia', expected bias, norm, embedding, head; did you mean 'bias'?"),
        (
            "method: lorra",
            "--method: found 'lorra', expected lora, dora, ",
        ),
        ("model: ''", "--model: found '', expected a text that is not empty"),
        ("out: ' '", "--out: found ' ', expected a folder's name"),
        ("revision: 2020-01-01", "--revision: found datetime.date(2020, 1, 1), expected a text"),
        ("- a\n- b", "DIR/run.yaml: expected keys with values"),
        ("just words", "DIR/run.yaml: expected keys with values"),
        ("rank: 8\n\talpha: 2", "DIR/run.yaml:2: not valid YAML"),
        ("tuning:\n\trank: 8", "YAML indents with blanks, not tabs"),
        ("rank: [1", "DIR/run.yaml:1: not valid YAML"),
        ("rank: 1\n---\nrank: 2", "not valid YAML"),
        ("model: !!python/object:os.system x", "DIR/run.yaml:1: not valid YAML: could not determine a constructor"),
        ("tuning: 5", "DIR/run.yaml:1: unknown key 'tuning'"),
        ("? [a, b]\n: 1", "DIR/run.yaml:1: unknown key"),
        ("revision: 2020-99-99", "DIR/run.yaml:1: month must be in 1..12"),
    ],
)
def test_a_wrong_value_is_told_what_was_expected(tmp_path: Path, text: str, said: str) -> None:
    assert said in error_of(tmp_path, text)


def test_a_missing_file_is_told_of_the_nearest(tmp_path: Path) -> None:
    write(tmp_path, "")
    with pytest.raises(ConfigError, match=r"no file .*rum\.yaml\n  did you mean   run\.yaml"):
        resolve(SFTConfig, file=str(tmp_path / "rum.yaml"), flags=NEEDED)


def test_a_folder_and_bytes_are_no_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be read: Is a directory"):
        resolve(SFTConfig, file=str(tmp_path), flags=NEEDED)
    (tmp_path / "x.yaml").write_bytes(b"model: \xe9")
    with pytest.raises(ConfigError, match="not UTF-8 text: byte 0xE9"):
        resolve(SFTConfig, file=str(tmp_path / "x.yaml"), flags=NEEDED)


def test_all_wrong_and_missing_settings_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(SFTConfig, file=None, flags={"rank": "a", "clip": "-1"})
    assert all(part in str(caught.value) for part in ("--rank", "--clip", "--model is required", "--data is required"))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"val_split": 0.1, "val_data": ["v"]}, "--val-split and --val-data: each names the held-out rows"),
        ({"select": "best"}, "--select best needs held-out rows"),
        ({"eval_every": 5}, "--eval-every needs held-out rows"),
        ({"method": "full", "rank": 8}, "--rank: no setting of --method full"),
        ({"method": "full", "rank": 16, "use_rslora": True}, "--rank, --use-rslora: no setting of --method full"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(flags: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        resolve(SFTConfig, file=None, flags=NEEDED | flags)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"top_p": 0.5}, "--top-p needs --temperature"),
        ({"system": "s", "template": "none"}, "--system needs a template"),
        ({"allow_other_base": True}, "--allow-other-base needs --adapter"),
    ],
)
def test_a_generate_setting_without_effect_is_refused(flags: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        resolve(GenerateConfig, file=None, flags={"model": "m", "prompt": "p"} | flags)


def test_the_file_of_a_full_run_can_be_given_back(tmp_path: Path) -> None:
    made = resolve(PretrainConfig, file=None, flags=NEEDED)
    again = resolve(PretrainConfig, file=write(tmp_path, made.to_yaml()), flags={})
    assert again.config == made.config


def test_a_file_says_where_each_value_came_from(tmp_path: Path) -> None:
    text = resolve(SFTConfig, file=write(tmp_path, "alpha: 4"), flags=NEEDED).to_yaml()
    assert "  model: m  # flag\n" in text
    assert "  alpha: 4.0  # file\n" in text
    assert "  rank: 16  # default\n" in text


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=TEXT,
    long=st.sampled_from([1, 2, 100]),
    names=st.lists(TEXT, min_size=1, max_size=3),
    number=st.floats(1e-9, 1e9),
)
@example(text="\x85", long=1, names=["a\u2028b", "雪"], number=1.0)
def test_any_config_comes_back_from_its_own_file(
    tmp_path: Path, text: str, long: int, names: list[str], number: float
) -> None:
    flags = {"model": "m" + text, "data": names, "system": text * long, "lr": number, "targets": names}
    made = resolve(SFTConfig, file=None, flags=flags)
    path = tmp_path / "out.yaml"
    path.write_bytes(made.to_yaml().encode())
    again = resolve(SFTConfig, file=str(path), flags={})
    assert again.config == made.config


def test_python_callers_get_the_same_errors() -> None:
    with pytest.raises(ConfigError, match="--rank: found 0, expected more than 0"):
        LoRA(rank=0)
    with pytest.raises(ConfigError, match="unknown setting 'rnak'; did you mean 'rank'"):
        LoRA(rnak=8)  # type: ignore[call-arg]


def test_a_config_is_frozen() -> None:
    with pytest.raises(Exception, match="frozen"):
        LoRA().rank = 3
