"""``truetune verify`` as a command: what it takes, what it prints and keeps, and what it says of wrong input."""

import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import truetune
from proof_runs import change_json, copy_of, facts, row_of, trained, verdict
from training_runs import run_pretrain, run_sft, write_rows
from truetune.cli.main import main
from truetune.config.export import ExportConfig
from truetune.config.generate import GenerateConfig
from truetune.config.resolve import resolve
from truetune.config.verify import VerifyConfig
from truetune.data.template import Template
from truetune.errors import CheckpointError, ConfigError, TruetuneError
from truetune.generate.answer import answer_all
from truetune.recipes import export, verify_reference
from truetune.recipes.generate import load_speaker
from truetune.train.log import Screen


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tiny_model, tmp_path_factory.mktemp("proof"))


@pytest.fixture(scope="module")
def merged(run: Path) -> Path:
    return run.parent / "merged"


# --- the command ---------------------------------------------------------------------------------------------------


def test_without_artefacts_those_that_were_made_from_the_run(
    run: Path, merged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(run), "--prompts", "2", "--max-new-tokens", "4", "--json"]) == 0
    *table, last = capsys.readouterr().out.strip().splitlines()
    found = json.loads(last)
    assert [row["name"] for row in found["artefacts"]] == [str(run / "adapter"), str(merged.resolve())]
    assert found == json.loads((run / "verify.json").read_text(encoding="utf-8"))
    assert sum("the same" in line for line in table) == 2


def test_drift_is_exit_code_1_and_named(
    run: Path, merged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = copy_of(merged, tmp_path / "wrong")
    (wrong / "chat_template.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
    assert main(["verify", str(run), str(merged), "--prompts", "2", "--max-new-tokens", "4", str(wrong)]) == 1
    out = capsys.readouterr().out
    assert "wrong: 4 of 4 prompts become other tokens" in out
    assert re.search(r"wrong: the prompt of \S+, row \d+ was '.+', and is '.+'", out)
    assert out.count("drift") == 1


def test_a_verdict_that_can_t_be_kept_is_told_all_the_same(
    run: Path, merged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = copy_of(run, tmp_path / "run")
    (moved / "verify.json").unlink(missing_ok=True)
    (moved / "verify.json").mkdir()  # which no file replaces
    assert facts(moved, merged)["exit_code"] == 0
    said = capsys.readouterr()
    assert "the result is not kept in" in said.err
    assert "the same" in said.out


def test_an_adapter_alone_needs_the_reference_of_its_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = copy_of(run / "adapter", tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"without the prompts it was trained on(.|\n)*--reference"):
        facts(moved)
    found = facts(moved, reference=str(run / verify_reference.FILE))
    assert found["verdict"] == "faithful"
    assert not (moved / "verify.json").exists()  # an adapter is given away, and this names rows
    (tmp_path / "moved.verify.json").unlink()
    monkeypatch.chdir(moved)
    facts(Path(), reference=str(run / verify_reference.FILE))
    assert (tmp_path / "moved.verify.json").is_file()
    assert facts(run / "adapter")["run"] == str(run.resolve())


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["nowhere"], "there is no folder nowhere"),
        (["RUN", "nowhere"], "there is no artefact nowhere"),
        (["RUN", "RUN/data"], "nothing that can be verified"),
        (["RUN/data"], "neither a run nor an adapter"),
        (["RUN", "--against", "pefd"], "did you mean 'peft'"),
        (["RUN", "--served-model", "x"], "goes with --url"),
        (["RUN", "--url", "localhost:1"], "is no address"),
        (["RUN", "--reference", "RUN/run.yaml"], "no reference of a run"),
        (["RUN", "--model", "nowhere"], "there is no folder nowhere"),
        ([], "run"),
    ],
)
def test_a_mistake_is_exit_code_2(argv: list[str], said: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [word.replace("RUN", str(run)) for word in argv]
    assert main(["verify", *given, *(["--prompts", "1", "--max-new-tokens", "1"] if argv else [])]) == 2
    captured = capsys.readouterr()
    assert said in captured.err + captured.out
    assert "Traceback" not in captured.err


def test_a_run_that_was_not_finished_says_so(run: Path, tmp_path: Path) -> None:
    cut = copy_of(run, tmp_path / "cut")
    shutil.rmtree(cut / "adapter")
    with pytest.raises(CheckpointError, match="its training has not ended"):
        facts(cut)


# --- adapters in other forms -----------------------------------------------------------------------------------------


def served(run: Path, out: Path) -> Path:
    export.run(resolve(ExportConfig, file=None, flags={"to": "peft-serving", "adapter": str(run), "out": str(out)}))
    return out


def test_an_adapter_for_servers_is_held_against_the_run(run: Path, tmp_path: Path) -> None:
    moved = copy_of(run, tmp_path / "run")
    (moved / "artefacts.json").unlink(missing_ok=True)
    out = served(moved, tmp_path / "served")
    (_, row) = facts(moved)["artefacts"]  # without being named
    assert (row["name"], row["verdict"], row["prompts"], row["answers"]) == (str(out), "faithful", [8, 8], [8, 8])


def test_an_adapter_that_was_changed_on_its_way_is_drift(run: Path, tmp_path: Path) -> None:
    wrong = served(copy_of(run, tmp_path / "run"), tmp_path / "scaled")
    change_json(wrong / "adapter_config.json", lora_alpha=99.0)
    assert "logits differ" in verdict(run, wrong)[1]
    worded = copy_of(run / "adapter", tmp_path / "worded")
    card = json.loads((worded / "truetune.json").read_text(encoding="utf-8"))
    other = Template("own", "{{ messages[0].content }}")
    change_json(worded / "truetune.json", template=card["template"] | {"source": other.source})
    assert "was trained on another template" in verdict(run, worded)[1]  # than it brings
    change_json(worded / "truetune.json", template=card["template"] | {"source": other.source, "sha256": other.digest})
    assert "8 of 8 prompts become other tokens" in verdict(run, worded)[1]


def test_an_adapter_with_a_base_of_its_own(tiny_model: Path, tmp_path: Path) -> None:
    run = trained(tiny_model, tmp_path, trainable=["norm"])
    out = served(run, tmp_path / "served")
    assert (out / "base").is_dir()
    assert verdict(run, out) == ("faithful", "")
    shutil.rmtree(out / "base")  # on the run's own base it is another model
    shutil.copytree(tiny_model, out / "base")
    says, why = verdict(run, out)
    assert (says, "was trained on other weights" in why) == ("drift", True)


@pytest.mark.filterwarnings("ignore:Position ids are not supported")  # by PEFT, which counts them itself
@pytest.mark.parametrize(
    "flags",
    [
        {"method": "prompt", "virtual_tokens": 3},
        {"method": "prefix", "virtual_tokens": 3},
        {"method": "lora", "new_tokens": ["<call>", "<end>"]},
    ],
    ids=lambda flags: flags["method"],
)
def test_peft_answers_behind_virtual_and_with_new_tokens(
    flags: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    settings = {"val_split": 0.3, "epochs": 3, "lr": 3e-2}
    run_sft(tiny_model, write_rows(tmp_path / "rows.jsonl"), tmp_path / "run", **(settings | flags))
    found = facts(tmp_path / "run", against="peft")
    assert row_of(found, tmp_path / "run" / "adapter", "peft")["verdict"] == "faithful"


def test_what_a_library_cannot_answer_is_said(tiny_model: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    run_sft(tiny_model, rows, tmp_path / "run", method="bottleneck", max_steps=1)
    with pytest.raises(ConfigError, match=r"no model's folder(.|\n)*truetune merge"):
        facts(tmp_path / "run", against="transformers")
    row = row_of(facts(tmp_path / "run", against="peft"), tmp_path / "run" / "adapter", "peft")
    assert (row["verdict"], "PEFT has no such method" in row["reasons"][0]) == ("unknown", True)
    run_sft(tiny_model, rows, tmp_path / "whole", method="full", max_steps=1)
    found = facts(tmp_path / "whole", against="transformers")
    assert row_of(found, tmp_path / "whole" / "model", "transformers")["verdict"] == "faithful"


def test_where_the_proof_is_kept(run: Path, tmp_path: Path) -> None:
    facts(run, out=str(tmp_path / "proof.json"), prompts=1)
    assert json.loads((tmp_path / "proof.json").read_text(encoding="utf-8"))["verdict"] == "faithful"
    for place in (tmp_path, tmp_path / "not there" / "proof.json"):
        with pytest.raises(ConfigError, match="is no place for a file"):
            facts(run, out=str(place))


# --- settings ------------------------------------------------------------------------------------------------------

SETTINGS: dict[str, tuple[dict[str, Any], Callable[[dict[str, Any]], Any], Any]] = {
    "artefacts": ({"artefacts": ()}, lambda f: len(f["artefacts"]), 2),
    "against": ({"against": "peft"}, lambda f: [r["loader"] for r in f["artefacts"]], ["truetune", "truetune", "peft"]),
    "prompts": ({"prompts": 1}, lambda f: f["artefacts"][1]["prompts"], [2, 2]),
    "max_new_tokens": ({"max_new_tokens": 250}, lambda f: f["artefacts"][1]["answers"], None),
    "dtype": ({"dtype": "bfloat16"}, lambda f: f["artefacts"][1]["kind"], "bf16"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_does_what_it_says(name: str, run: Path, merged: Path) -> None:
    settings, look, expected = SETTINGS[name]
    assert look(facts(run, **({"artefacts": (str(merged),)} | settings))) == expected


def test_every_setting_is_tried_here_or_in_a_test_of_its_own() -> None:
    elsewhere = {
        "run", "reference", "out", "url", "served_model", "model", "allow_mismatch", "allow_other_base", "revision",
        "device",
    }  # fmt: skip
    assert set(VerifyConfig.model_fields) == set(SETTINGS) | elsewhere


@pytest.mark.parametrize("flags", [{"revision": "main"}, {"device": "cuda"}])
def test_what_a_local_base_or_this_machine_lacks_is_refused(flags: dict[str, str], run: Path) -> None:
    import torch

    if "device" in flags and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(TruetuneError, match=r"--revision is for|--device cuda"):
        facts(run, **flags)


# --- what a run keeps ----------------------------------------------------------------------------------------------


def test_the_reference_holds_the_tokens_that_were_trained(run: Path, tiny_model: Path) -> None:
    kept = verify_reference.read(run / verify_reference.FILE)
    speaker = load_speaker(GenerateConfig(model=str(tiny_model), adapter=str(run / "adapter"), prompt=""), Screen())
    assert {sample.part for sample in kept.samples} == {"train", "held_out"}
    assert kept.stop_ids == (258,)
    for sample in kept.samples:
        (turn,) = sample.messages
        assert sample.prompt == speaker.prompt_ids(turn["content"])
        assert sample.tokens[sample.positions[-1]] == 258  # the stop token is compared
        assert len(sample.top_ids) == len(sample.positions) <= 32
        assert sample.text == speaker.tokenizer.decode(sample.prompt)


def test_a_run_may_keep_none(tiny_model: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    run_sft(tiny_model, rows, tmp_path / "run", max_steps=1, verify_prompts=0)
    assert not (tmp_path / "run" / verify_reference.FILE).exists()
    with pytest.raises(TruetuneError, match="--verify-prompts is 0"):
        run_sft(tiny_model, rows, tmp_path / "again", max_steps=1, verify_prompts=0, verify=True)


def test_training_may_end_with_the_proof(tiny_model: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    result = run_sft(tiny_model, rows, tmp_path / "run", max_steps=2, verify=True)
    assert (result["verify"], result["exit_code"]) == ("faithful", 0)
    dry = run_sft(tiny_model, rows, tmp_path / "dry", max_steps=2, verify=True, dry_run=True)
    assert "verify" not in dry


@pytest.mark.parametrize("flags", [{"method": "full"}, {"method": "lora", "quant": "nf4"}, {"method": "prompt"}])
def test_other_results_are_proven_too(flags: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    run_sft(tiny_model, rows, tmp_path / "run", max_steps=2, **flags)
    assert facts(tmp_path / "run")["verdict"] == "faithful"


def test_bare_text_is_compared_by_its_tokens(tiny_model: Path, tmp_path: Path) -> None:
    rows = [json.dumps({"text": "the quick brown fox " * n}) + "\n" for n in range(2, 9)]
    (tmp_path / "text.jsonl").write_text("".join(rows), encoding="utf-8")
    run = tmp_path / "run"
    run_pretrain(tiny_model, tmp_path / "text.jsonl", run, method="lora", max_length=60, max_steps=2, lr=1e-2)
    truetune.merge(str(tiny_model), str(run / "adapter"), str(tmp_path / "merged"))
    row = row_of(facts(run, tmp_path / "merged"), tmp_path / "merged")
    assert (row["verdict"], row["prompts"]) == ("faithful", [4, 4])


# --- what an adapter was trained with --------------------------------------------------------------------------------


def ask(model: Path, run: Path, *flags: str) -> int:
    given = ["--model", str(model), "--adapter", str(run / "adapter"), "--prompt", "x", "--max-new-tokens", "1"]
    return main(["generate", *given, *flags])


def test_another_template_is_refused_unless_it_is_meant(
    run: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(tiny_model, run, "--template", "alpaca") == 2
    assert "was trained on another template" in (said := capsys.readouterr().err)
    assert "own (3929c6eb)" in said
    assert ask(tiny_model, run, "--template", "alpaca", "--allow-mismatch", "template") == 0
    assert ask(tiny_model, run, "--template", "none", "--allow-mismatch", "base") == 2


def test_another_vocabulary_is_refused_unless_it_is_meant(
    run: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = copy_of(tiny_model, tmp_path / "other")
    text = (other / "tokenizer.json").read_text(encoding="utf-8")
    known = json.loads(text)
    vocabulary = known["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(known), encoding="utf-8")
    assert ask(other, run) == 2
    assert "another vocabulary" in capsys.readouterr().err
    assert ask(other, run, "--allow-mismatch", "base,tokenizer") == 0


# --- servers ---------------------------------------------------------------------------------------------------------


class Fake(ThreadingHTTPServer):
    """A server that says what the run's model says, or something a little else."""

    daemon_threads = True

    def __init__(self, run: Path, base: Path) -> None:
        config = GenerateConfig(model=str(base), adapter=str(run / "adapter"), prompt="")
        self.speaker, self.extra, self.suffix = load_speaker(config, Screen()), 0, ""
        super().__init__(("127.0.0.1", 0), _Handler)

    def reply(self, body: dict[str, Any]) -> dict[str, Any]:
        ids = self.speaker.prompt_ids(body["messages"][0]["content"])
        stop_ids = self.speaker.stop_ids
        (new,) = answer_all(self.speaker.model, [ids], stop_ids=stop_ids, longest=body["max_tokens"])
        text = self.speaker.tokenizer.hf.decode(new, skip_special_tokens=True)
        finish = "stop" if new[-1] in self.speaker.stop_ids else "length"
        return {
            "choices": [{"message": {"content": text + self.suffix}, "finish_reason": finish}],
            "usage": {"prompt_tokens": len(ids) + self.extra},
        }


class _Handler(BaseHTTPRequestHandler):
    server: Fake

    def do_GET(self) -> None:
        self._say({"data": [{"id": name} for name in ("tiny", "other")]} if self.path == "/v1/models" else {}, 200)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        known = body["model"] == "tiny"
        self._say(self.server.reply(body) if known else {"error": "no such model"}, 200 if known else 404)

    def _say(self, value: dict[str, Any], status: int) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""


@pytest.fixture(scope="module")
def server(run: Path, tiny_model: Path) -> Iterator[Fake]:
    fake = Fake(run, tiny_model)
    thread = threading.Thread(target=fake.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield fake
    fake.shutdown()
    thread.join()
    fake.server_close()


@pytest.mark.parametrize(
    ("extra", "suffix", "says", "why"),
    [
        (0, "", "faithful", ""),
        (1, "", "drift", "4 of 4 prompts become other tokens"),  # a second start token, say
        (0, "!", "drift", "0 of 4 greedy answers are the same"),
    ],
)
def test_a_server_is_held_to_prompts_and_answers(
    extra: int, suffix: str, says: str, why: str, server: Fake, run: Path
) -> None:
    server.extra, server.suffix = extra, suffix
    url = f"http://127.0.0.1:{server.server_port}"
    (row,) = [r for r in facts(run, url=url, prompts=2)["artefacts"] if r["loader"] == "http"]
    assert row["verdict"] == says
    assert why in " ".join(row["reasons"])
    assert row["notes"] == ["asked for the model 'tiny'; it lists tiny, other: --served-model names another"]


def test_a_server_that_does_not_know_the_model_can_t_be_told(server: Fake, run: Path) -> None:
    found = facts(run, url=f"http://127.0.0.1:{server.server_port}/v1/", served_model="other", prompts=1)
    assert found["exit_code"] == 2
    assert "refuses /chat/completions: 404" in str(found["artefacts"])


def test_a_server_that_is_not_there_can_t_be_told(run: Path) -> None:
    found = facts(run, url="http://127.0.0.1:9", prompts=1)
    assert found["exit_code"] == 2
    assert "does not answer" in str(found["artefacts"])


def test_what_was_not_recorded_of_a_run_is_passed_over(run: Path, tmp_path: Path) -> None:
    moved = copy_of(run, tmp_path / "run")
    change_json(moved / "artefacts.json", artefacts=[str(tmp_path / "gone")])
    assert len(facts(moved)["artefacts"]) == 1


def test_a_merged_model_alone_is_told_to_name_its_run(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tiny_model)]) == 2
    assert f"truetune verify RUN {tiny_model}" in capsys.readouterr().err


# --- several adapters ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second run on the same base, with rows of its own."""
    place = tmp_path_factory.mktemp("other")
    rows = place / "rows.jsonl"
    lines = [json.dumps({"instruction": f"Say {n}", "output": f"no, {n * 7}"}) for n in range(12)]
    rows.write_text("\n".join(lines) + "\n", encoding="utf-8")
    run_sft(tiny_model, rows, place / "run", val_split=0.3, epochs=3, lr=3e-2, alpha=8)
    return place / "run"


def test_what_several_adapters_became_is_held_against_them_beside_the_base(
    run: Path, other: Path, tiny_model: Path, tmp_path: Path
) -> None:
    given = [f"{run / 'adapter'}=0.7", f"{other / 'adapter'}=-0.4"]
    out = tmp_path / "merged"
    flags = ["merge", "--model", str(tiny_model), "--adapter", *given, "--out", str(out), "--verify"]
    assert main(flags) == 0
    assert not (out / "verify.json").exists()  # a model is given away, and this names rows
    kept = json.loads((tmp_path / "merged.verify.json").read_text(encoding="utf-8"))
    assert kept["run"] == f"{run / 'adapter'}=0.7 + {other / 'adapter'}=-0.4 (cat)"
    (row,) = kept["artefacts"]
    samples = verify_reference.read(run / verify_reference.FILE).samples
    more = verify_reference.read(other / verify_reference.FILE).samples
    assert (row["verdict"], row["prompts"]) == ("faithful", [len(samples) + len(more)] * 2)
    assert row["logits"]["max_delta"] < 1e-5
    assert row["effect_share"] < 1e-4


def test_one_adapter_of_several_is_held_against_and_no_other_weights(
    run: Path, other: Path, tiny_model: Path, tmp_path: Path
) -> None:
    both = [str(run / "adapter"), str(other / "adapter")]
    truetune.merge(None, both, str(tmp_path / "sum"), to="adapter")
    truetune.merge(str(tiny_model), str(tmp_path / "sum"), str(tmp_path / "merged"))
    assert verify_of(tmp_path / "sum", tmp_path / "merged") == [("merged", "faithful")]
    truetune.merge(str(tiny_model), [f"{both[0]}=0.9", both[1]], str(tmp_path / "less"))
    assert verify_of(tmp_path / "sum", tmp_path / "less") == [("less", "drift")]
    with pytest.raises(ConfigError, match=r"made of several adapters(.|\n)*name what was made of it"):
        verify_of(tmp_path / "sum")
    moved = copy_of(tmp_path / "sum", run / "sum")  # in a run's folder it is still no result of that run
    try:
        with pytest.raises(ConfigError, match="made of several adapters"):
            verify_of(moved)
    finally:
        shutil.rmtree(moved)
    change_json(tmp_path / "sum" / "truetune.json", combination={"kind": "cat", "parents": [
        {"folder": both[0], "weight": 1.0, "method": "lora", "sha256": "of another adapter"},
    ]})  # fmt: skip
    with pytest.raises(CheckpointError, match="none of the adapters"):
        verify_of(tmp_path / "sum", tmp_path / "merged")


def test_adapters_that_lie_without_their_prompts_prove_nothing(run: Path, tiny_model: Path, tmp_path: Path) -> None:
    alone = copy_of(run / "adapter", tmp_path / "alone")
    given = [f"{alone}=0.5"]
    with pytest.raises(CheckpointError, match=r"none of the adapters(.|\n)*--reference"):
        truetune.merge(str(tiny_model), given, str(tmp_path / "merged"), verify=True)
    assert not (tmp_path / "merged").exists()


def verify_of(adapter: Path, *artefacts: Path) -> list[tuple[str, str]]:
    return [(Path(row["name"]).name, row["verdict"]) for row in facts(adapter, *artefacts)["artefacts"]]
