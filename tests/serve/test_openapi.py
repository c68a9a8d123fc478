"""The server's description is true: what is made from it is answered as it says."""

from __future__ import annotations

import json
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from serve.live import Live

HI = [{"role": "user", "content": "hi"}]
UNSUPPORTED = {"tool_choice", "logit_bias", "suffix", "best_of", "dimensions", "stream_options"}
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
ROUTES = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/embeddings"),
    ("GET", "/v1/models"),
    ("GET", "/health"),
    ("GET", "/metrics"),
    ("GET", "/openapi.json"),
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_what_is_made_from_the_description_is_answered_as_it_says(live: Live, method: str, path: str) -> None:
    schema: Any = schemathesis.openapi.from_dict(json.loads(live.ask("/openapi.json")[2]))
    operation = schema[path][method]
    statuses = set()

    @settings(max_examples=25 if method == "POST" else 2, deadline=None, database=None, derandomize=True,
              phases=[Phase.generate], suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(case=operation.as_strategy())
    def run(case: Any) -> None:
        if isinstance(case.body, dict) and case.body.get("model"):
            # What a schema can't say; else nothing but refusals would be seen.
            case.body |= {"model": "base", **({"messages": HI, "tools": None} if "messages" in case.body else {})}
            case.body |= dict.fromkeys(UNSUPPORTED & case.body.keys())
            case.body |= {"max_tokens": 3} if "embeddings" not in path else {}
        response = case.call(base_url=live.url)
        case.validate_response(response, checks=CHECKS)
        statuses.add(response.status_code)

    run()
    assert 200 in statuses
    assert live.ask("/health")[0] == 200


def test_every_route_is_described(live: Live) -> None:
    found = json.loads(live.ask("/openapi.json")[2])["paths"]
    assert {(method.upper(), path) for path, methods in found.items() for method in methods} == set(ROUTES)


def test_answers_and_refusals_are_of_the_described_form(live: Live) -> None:
    schema: Any = schemathesis.openapi.from_dict(json.loads(live.ask("/openapi.json")[2]))
    for path, body in [
        ("/v1/chat/completions", {"model": "base", "messages": HI, "max_tokens": 3, "logprobs": True}),
        ("/v1/completions", {"model": "red", "prompt": "hi", "max_tokens": 3, "logprobs": 2}),
        ("/v1/embeddings", {"model": "red", "input": "hi"}),
        ("/v1/chat/completions", {"model": "nobody", "messages": HI}),
        ("/v1/completions", {"model": "base", "prompt": 5}),
    ]:
        case = schema[path]["POST"].Case(body=body, media_type="application/json")
        case.validate_response(case.call(base_url=live.url), checks=CHECKS)
