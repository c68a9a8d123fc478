"""Answers of a form: valid whatever the model says, the same in any company, and ended where the form ends."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import torch

from serving import answers
from truetune.errors import ConfigError, ModelError
from truetune.generate import grammar
from truetune.generate.engine import Engine
from truetune.generate.request import Delta, Request, Sampling
from truetune.models.load import load_model
from truetune.models.tokenizer import ChatTokenizer

pytestmark = pytest.mark.skipif(importlib.util.find_spec("llguidance") is None, reason="llguidance is not installed")

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "n": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["a", "bé"]},
        "on": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["n", "kind", "on"],
    "additionalProperties": False,
}
TEXT = grammar.whole(grammar.of_json(SCHEMA))


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Engine:
    model, tokenizer = load_model(str(tiny_model), dtype=torch.float32), ChatTokenizer.load(str(tiny_model))
    return Engine(model, tokenizer, max_rows=8, max_tokens=2048, step_tokens=32)


def asked(engine: Engine, seed: int, text: str = TEXT, **more: Any) -> Request:
    settings = {"max_new_tokens": 220, "stop_ids": engine.tokenizer.stop_ids, "grammar": engine.grammars.read(text)}
    return Request([5, 6, 7], sampling=Sampling(temperature=1.0, seed=seed), **(settings | more))


def test_a_model_of_chance_writes_what_the_schema_allows(engine: Engine) -> None:
    found = answers(engine, [asked(engine, seed) for seed in range(12)])
    assert {delta.finish for delta in found} == {"stop"}
    values = [json.loads(delta.text) for delta in found]
    for value in values:
        jsonschema_rs.validate(SCHEMA, value)
    assert len({json.dumps(value) for value in values}) > 6  # drawn, not one text by heart


def test_free_rows_and_other_forms_do_not_change_an_answer(engine: Engine) -> None:
    alone = [answers(engine, [asked(engine, seed)])[0].ids for seed in (1, 2)]
    other = grammar.whole(grammar.of_json({"enum": ["red", "green"]}))
    free = Request([5, 6, 7], max_new_tokens=40, sampling=Sampling(temperature=1.0, seed=1))
    (free_alone,) = answers(engine, [free])
    together = answers(engine, [free, asked(engine, 1), asked(engine, 3, other), asked(engine, 2)])
    assert [together[1].ids, together[3].ids] == alone
    assert together[0].ids == free_alone.ids
    assert json.loads(together[2].text) in ("red", "green")


def test_pieces_add_up_and_the_last_one_says_why(engine: Engine) -> None:
    seen: list[Delta] = []
    engine.submit(asked(engine, 4), on_delta=seen.append)
    while engine.step():
        pass
    (whole,) = answers(engine, [asked(engine, 4)])
    assert "".join(delta.text for delta in seen) == whole.text
    assert [delta.finish for delta in seen if delta.finish] == ["stop"]
    assert len(seen) == len(whole.ids)


def test_an_answer_that_may_go_on_ends_by_its_stop_token(engine: Engine) -> None:
    """Digits may follow a number for ever: the model ends it, and not the grammar."""
    found = answers(engine, [asked(engine, seed, grammar.whole(grammar.of_json({"type": "integer", "minimum": 1})))
                             for seed in range(30)])  # fmt: skip
    ended = [delta for delta in found if delta.finish == "stop"]
    assert ended
    for delta in ended:
        assert delta.ids[-1] in engine.tokenizer.stop_ids
        assert isinstance(json.loads(delta.text), int)


def test_an_answer_that_is_cut_says_so(engine: Engine) -> None:
    (found,) = answers(engine, [asked(engine, 1, max_new_tokens=3)])
    (whole,) = answers(engine, [asked(engine, 1)])
    assert (found.finish, len(found.ids)) == ("length", 3)
    assert whole.text.startswith(found.text)
    with pytest.raises(ValueError, match=r"."):
        json.loads(found.text)


def test_greedy_takes_the_likeliest_token_that_is_allowed(engine: Engine) -> None:
    text = grammar.whole(grammar.of_json({"enum": ["a", "b", "c", "d"]}))
    (found,) = answers(engine, [Request([5, 6, 7], grammar=engine.grammars.read(text), logprobs=300)])
    assert found.logprobs is not None
    quote = next(n for n, entry in enumerate(found.logprobs) if engine.tokenizer.decode([entry.id]) in "abcd")
    scores = dict(found.logprobs[quote].top)
    allowed = [engine.tokenizer.encode([letter])[0][0] for letter in "abcd"]
    assert found.ids[quote] == max(allowed, key=scores.__getitem__)
    assert max(scores.values()) > scores[found.ids[quote]]  # of the model's own words, which the form ruled out


def test_logits_that_are_no_numbers_are_an_error_here_too(engine: Engine) -> None:
    table = engine.model.get_input_embeddings().weight
    before = table[100].clone()
    try:
        table.data[100] = float("nan")
        handle = engine.submit(Request([100], grammar=engine.grammars.read(TEXT)))
        while engine.step():
            pass
    finally:
        table.data[100] = before
    end = handle.result()
    assert (end.finish, end.error) == ("error", "the model's logits are not finite")


def test_references_and_nesting_are_followed(engine: Engine) -> None:
    tree = {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "v": {"type": "boolean"},
                    "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]},
                },
                "required": ["v", "next"],
                "additionalProperties": False,
            }
        },
    }
    found = answers(engine, [asked(engine, seed, grammar.whole(grammar.of_json(tree))) for seed in range(6)])
    ended = [json.loads(delta.text) for delta in found if delta.finish == "stop"]
    assert ended
    for value in ended:
        jsonschema_rs.validate(tree, value)


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "nothing"}, "Invalid type: nothing"),
        ({"not": {"type": "string"}}, 'Unimplemented keys: \\["not"\\]'),
        ({"$ref": "https://example.com/x.json"}, "Resource 'https://example.com/x.json'"),
        ({"$ref": "#/$defs/nowhere"}, "does not exist"),
        ({"enum": []}, "no answer can have this form"),
        ({"type": "string", "format": "nonsense"}, "Unknown format"),
        ({"type": "string", "pattern": "(?=a)b"}, "no answer can have this form"),
        ({"enum": [str(n) * 3 for n in range(30_000)]}, "characters"),
        # What would make the library drop what it does not know is no client's to set.
        ({"x-guidance": {"lenient": True}, "not": {}}, "Unimplemented"),
    ],
)  # fmt: skip
def test_a_form_that_can_not_be_had_is_refused(engine: Engine, schema: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        engine.grammars.read(grammar.whole(grammar.of_json(schema)))


def test_the_same_form_is_read_once(engine: Engine) -> None:
    assert engine.grammars.read(TEXT) is engine.grammars.read(TEXT)


def test_white_space_comes_to_an_end(engine: Engine) -> None:
    guide = engine.grammars.read(TEXT).guide()
    (brace,), (space,) = engine.tokenizer.encode(["{", " "])
    stop_ids = engine.tokenizer.stop_ids
    guide.took(brace)
    count = 0
    while bool(guide.allowed(300, stop_ids)[space]):
        guide.took(space)
        count += 1
        assert count < 100
    assert count > 20  # as deep as JSON is indented
    with pytest.raises(ModelError, match="can't be followed"):
        guide.took(space)


def test_stop_tokens_are_allowed_where_the_text_is_whole_and_nowhere_else(engine: Engine) -> None:
    guide = engine.grammars.read(grammar.whole('"ab" "c"?')).guide()
    (ids,), ends = engine.tokenizer.encode(["abc"]), [256, 258]
    allowed = []
    for token in ids:
        allowed.append(guide.allowed(259, ends).nonzero().flatten().tolist())
        guide.took(token)
    assert [[i for i in found if i in (256, 257, 258)] for found in allowed] == [[], [], ends]
    assert guide.is_whole


def test_without_the_library_it_says_what_to_install(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ConfigError, match="needs llguidance") as caught:
        grammar.Grammars(ChatTokenizer.load(str(tiny_model)).hf).read(TEXT)
    assert ("way out", "pip install 'truetune[json]'") in caught.value.notes
