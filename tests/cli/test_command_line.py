"""The command line: what is understood, what is refused, and how it is said."""

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from truetune.cli import flags, main
from truetune.config.generate import GenerateConfig
from truetune.config.inspect import InspectConfig
from truetune.config.sft import SFTConfig
from truetune.errors import ConfigError

SHELL = [sys.executable, "-m", "truetune"]


def parsed(*argv: str, config: Any = SFTConfig) -> dict[str, Any]:
    return flags.parse("sft", config, argv)[0]


def refused(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 2) -> str:
    """The error that a command line gets: one block on stderr, no traceback, nothing on stdout."""
    assert main.main(argv) == code
    seen = capsys.readouterr()
    assert seen.out == ""
    assert seen.err.startswith("error: ")
    assert "Traceback" not in seen.err
    return seen.err


def test_an_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no command 'stf'\n  did you mean   sft" in refused(capsys, "stf")


@pytest.mark.parametrize(
    ("flag", "close"),
    [
        ("--rnak", "--rank"),
        ("--learnig-rate", "--learning-rate"),
        ("--learning_rate", "--learning-rate"),
        ("--no-pakcing", "--no-packing"),
        ("--cnofig", "--config"),
        ("--rnak=8", "--rank"),
    ],
)
def test_an_unknown_flag_names_the_nearest(capsys: pytest.CaptureFixture[str], flag: str, close: str) -> None:
    text = refused(capsys, "sft", "--model", "m", flag, "8")
    assert f"unknown flag {flag.split('=')[0]}\n  did you mean   {close}\n" in text


def test_flags_are_not_abbreviated(capsys: pytest.CaptureFixture[str]) -> None:
    assert "unknown flag --mod" in refused(capsys, "sft", "--mod", "m")


def test_a_stray_word_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "'extra' belongs to no flag" in refused(capsys, "sft", "--rank", "8", "extra")


def test_a_flag_without_its_value_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--rank needs a value\n  way out   --rank VALUE" in refused(capsys, "sft", "--lora-rank")
    assert "--prompt=VALUE when the value starts with a dash" in refused(capsys, "generate", "--prompt", "-x")


def test_a_switch_takes_no_value(capsys: pytest.CaptureFixture[str]) -> None:
    text = refused(capsys, "sft", "--packing=true")
    assert "--packing takes no value, and 'true' was given\n  way out   --packing or --no-packing" in text


def test_a_value_of_the_wrong_type_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    text = refused(capsys, "sft", "--model", "m", "--data", "d", "--rank", "eight", "--dtype", "float64")
    assert "--rank: found 'eight', expected a whole number" in text
    assert "--dtype: found 'float64', expected auto, float32, bfloat16, float16; did you mean 'float16'?" in text


@pytest.mark.parametrize(
    ("command", "missing"),
    [
        ("sft", ["--model", "--data"]),
        ("pretrain", ["--model", "--data"]),
        ("merge", ["--adapter", "--out"]),
        ("generate", ["--model"]),
        ("quantize", ["--path", "--out"]),
    ],
)
def test_every_missing_setting_is_named_at_once(
    capsys: pytest.CaptureFixture[str], command: str, missing: list[str]
) -> None:
    text = refused(capsys, command)
    assert all(f"{flag} is required" in text for flag in missing)
    assert f"truetune {command} --help" in text


def test_inspect_wants_something_to_look_at(capsys: pytest.CaptureFixture[str]) -> None:
    assert "a folder or file to look at, or --methods" in refused(capsys, "inspect")


def test_an_equals_sign_and_a_blank_mean_the_same() -> None:
    assert parsed("--rank=8", "--lr=-1") == parsed("--rank", "8", "--lr", "-1") == {"rank": "8", "lr": "-1"}


def test_a_list_may_be_repeated_or_written_in_one_go() -> None:
    expected = {"data": ["a", "b", "c"]}
    assert parsed("--data", "a", "--data", "b", "c") == parsed("--data", "a", "b", "--dataset=c") == expected


def test_of_a_flag_given_twice_the_last_counts() -> None:
    assert parsed("--rank", "4", "--lora-rank", "8") == {"rank": "8"}


def test_a_switch_has_three_states() -> None:
    assert (parsed(), parsed("--packing"), parsed("--no-packing")) == ({}, {"packing": True}, {"packing": False})


@pytest.mark.parametrize(
    ("alias", "field"),
    [
        ("--learning-rate", "lr"), ("--lora-rank", "rank"), ("--lora-alpha", "alpha"), ("--target-modules", "targets"),
        ("--num-train-epochs", "epochs"), ("--output-dir", "out"), ("--model-name-or-path", "model"),
        ("--lora-dropout", "dropout"), ("--max-seq-length", "max_length"), ("--max-grad-norm", "clip"),
        ("--lr-scheduler-type", "schedule"), ("--warmup-ratio", "warmup"), ("--eval-steps", "eval_every"),
        ("--save-steps", "save_every"), ("--logging-steps", "log_every"), ("--save-total-limit", "keep"),
        ("--resume-from-checkpoint", "resume"), ("--dataset", "data"), ("--torch-dtype", "dtype"),
    ],
)  # fmt: skip
def test_the_spellings_of_other_tools_are_understood(alias: str, field: str) -> None:
    assert list(parsed(alias, "5")) == [field]


def test_a_prompt_may_be_a_dash_or_start_with_one() -> None:
    assert parsed("--prompt", "-", config=GenerateConfig) == {"prompt": ["-"]}
    assert parsed("--prompt=--why?", config=GenerateConfig) == {"prompt": ["--why?"]}


def test_a_path_may_be_given_with_or_without_its_flag() -> None:
    assert parsed("x", config=InspectConfig) == parsed("--path", "x", config=InspectConfig) == {"path": "x"}


@pytest.mark.parametrize("name", main.COMMANDS)
def test_help_names_every_setting(capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert main.main([name, "--help"]) == 0
    text = capsys.readouterr().out
    module, _, class_name = main.COMMANDS[name].config.partition(":")
    fields = getattr(__import__(module, fromlist=[class_name]), class_name).model_fields
    shown = text.replace("--[no-]", "--")
    for field, info in fields.items():
        assert f"--{field.replace('_', '-')} " in shown or f" {field.upper()} " in shown
        assert (info.description or "?").split()[0] in text
    assert "--config FILE.yaml" in text
    assert "--json" in text
    assert max(map(len, text.splitlines())) <= 110


def test_help_shows_defaults_and_choices(capsys: pytest.CaptureFixture[str]) -> None:
    main.main(["sft", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "[also --lora-rank, --lora-r, --init-r] (default: 16)" in text
    assert "(default: 0)" in text
    assert "--trainable bias|norm|embedding|head …" in text


def test_help_says_what_most_come_for_first_and_whose_the_other_settings_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    main.main(["sft", "--help"])
    text = capsys.readouterr().out
    assert text.startswith("usage: truetune sft --model TEXT --data X … [settings]\n")
    under = {
        part.partition(":\n")[0]: re.findall(r"^  (--\S+)", part, re.MULTILINE)
        for part in text.split("\n\n")
        if ":\n" in part
    }
    assert [under[title][0] for title in ("the model", "the data", "the run")] == ["--model", "--data", "--out"]
    assert under["the method"][:2] == ["--method", "--rank"]
    assert under["with --method prompt, ptuning or prefix"] == ["--virtual-tokens"]
    assert under["with --method lisa"] == ["--lisa-layers", "--lisa-every"]
    titles = list(under)
    assert titles.index("the run") < titles.index("with --method dora") < titles.index("with --method lisa")


def test_the_overview_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["--help"], ["-h"], ["help"]):
        assert main.main(argv) == 0
        assert all(f"  {name} " in capsys.readouterr().out.replace("\n", " \n") for name in [next(iter(main.COMMANDS))])


def test_the_version_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("truetune 0.")


def test_a_config_file_fault_names_file_and_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("model: m\nrnk: 8\n", encoding="utf-8")
    text = refused(capsys, "sft", "--config", str(tmp_path / "c.yaml"))
    assert f"{tmp_path}/c.yaml:2: unknown key 'rnk'; did you mean 'rank'?" in text


def test_the_last_line_of_stdout_is_one_json_object(capsys: pytest.CaptureFixture[str], alpaca_file: Path) -> None:
    assert main.main(["inspect", str(alpaca_file), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (facts["kind"], facts["rows"]) == ("data", 12)


def _planted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str) -> list[str]:
    """A command whose recipe is a file of the test's own."""
    (tmp_path / "planted_recipe.py").write_text(f"def run(resolved):\n    {body}\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "planted_recipe", raising=False)
    command = main.Command("truetune.config.inspect:InspectConfig", "planted_recipe", "")
    monkeypatch.setitem(main.COMMANDS, "planted", command)
    return ["planted", "x"]


def test_a_crash_inside_is_exit_code_3_and_called_our_fault(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(_planted(monkeypatch, tmp_path, "raise RuntimeError('wires crossed')")) == 3
    seen = capsys.readouterr().err
    assert "wires crossed" in seen
    assert "a fault of truetune's, not yours" in seen.splitlines()[-1]


def test_what_the_library_logs_is_said_on_stderr_by_commands_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body = "import logging; logging.getLogger('truetune.ops').info('a few seconds')"
    assert main.main(_planted(monkeypatch, tmp_path, body)) == 0
    logging.getLogger("truetune.ops").info("not this")
    assert capsys.readouterr() == ("", "truetune: a few seconds\n")


def test_a_key_press_is_exit_code_130(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(_planted(monkeypatch, tmp_path, "raise KeyboardInterrupt")) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_stop_that_was_asked_for_is_no_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body = "from truetune.errors import StoppedError; raise StoppedError(15, 'stopped at step 3', ('go on', 'again'))"
    assert main.main(_planted(monkeypatch, tmp_path, body)) == 143
    assert capsys.readouterr() == ("", "stopped at step 3\n  go on   again\n")


def test_an_error_that_is_not_the_users_has_its_own_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body = "from truetune.errors import NonFiniteError; raise NonFiniteError('step 3: the loss is not finite')"
    assert main.main(_planted(monkeypatch, tmp_path, body)) == 3
    assert capsys.readouterr().err == "error: step 3: the loss is not finite\n"


def test_the_shell_sees_the_codes_and_the_right_streams() -> None:
    done = subprocess.run([*SHELL, "sft", "--rank"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --rank needs a value")


def test_a_reader_that_leaves_early_gets_no_traceback() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([*SHELL, "sft", "--help"], stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_help_comes_without_torch() -> None:
    code = "import sys; from truetune.cli.main import main; main(['sft', '--help']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=True)


def test_parse_raises_what_main_prints() -> None:
    with pytest.raises(ConfigError, match="unknown flag --bogus"):
        parsed("--bogus")


def test_a_letter_that_the_terminal_does_not_know_ends_nothing(tmp_path: Path) -> None:
    """A console with an old code page, or output sent into a file under one."""
    (tmp_path / "行.jsonl").write_text('{"instruction": "a", "output": "b"}\n', encoding="utf-8")
    environment = os.environ | {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    for path in ("行.jsonl", "没有.jsonl"):
        done = subprocess.run(
            [*SHELL, "inspect", path, "--json"], cwd=tmp_path, env=environment, capture_output=True, check=False
        )
        assert b"Traceback" not in done.stderr
        assert done.returncode == (0 if path == "行.jsonl" else 2), done.stderr
    assert b"\\u6ca1\\u6709.jsonl" in done.stderr


def test_what_machines_read_is_json_to_the_letter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """NaN is none; a recipe that lets one through has a fault, and says so."""
    import truetune.recipes.inspect as recipe

    (tmp_path / "rows.txt").write_text("a", encoding="utf-8")
    monkeypatch.setattr(recipe, "run", lambda resolved: {"loss": float("nan")})
    assert main.main(["inspect", str(tmp_path / "rows.txt"), "--json"]) == 3
