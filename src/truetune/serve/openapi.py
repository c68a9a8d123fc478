"""The server's own description, made from the very types that requests are read with and answers are written with."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from truetune import __version__
from truetune.serve.protocol import ChatRequest, CompletionRequest, EmbeddingRequest
from truetune.serve.responses import (
    ChatChunk,
    ChatCompletion,
    Embeddings,
    Failure,
    Health,
    Models,
    TextCompletion,
)

_POSTS: Mapping[str, tuple[str, type[BaseModel], type[BaseModel], type[BaseModel] | None]] = {
    "/v1/chat/completions": ("Answer a conversation", ChatRequest, ChatCompletion, ChatChunk),
    "/v1/completions": ("Continue a text", CompletionRequest, TextCompletion, TextCompletion),
    "/v1/embeddings": ("Mean of the last hidden states", EmbeddingRequest, Embeddings, None),
}
_GETS: Mapping[str, tuple[str, type[BaseModel] | None]] = {
    "/v1/models": ("The models that can be asked", Models),
    "/health": ("Whether the server takes requests", Health),
    "/metrics": ("Figures in Prometheus' text form", None),
    "/openapi.json": ("This document", None),
}
_REFUSALS = {
    400: "The request can't be answered as it is", 401: "The API key is missing or wrong",
    403: "Not under this name", 404: "No such model", 405: "No such method", 408: "The body did not come in time",
    413: "The body is too large", 415: "The body is no JSON", 429: "Too many answers wait",
    500: "A fault of the server", 503: "The server is stopping, or an adapter is broken", 504: "No answer in time",
}  # fmt: skip
_FOR_ALL = (403, 405)


@functools.cache
def document(*, with_token: bool) -> str:
    """As JSON.

    Args:
        with_token: an API key is asked for.
    """
    schemas = _schemas()
    paths: dict[str, Any] = {}
    for path, (about, taken, given, event) in _POSTS.items():
        refused = (400, 404, 408, 413, 415, 429, 500, 503, 504)
        content = {"application/json": {"schema": _ref(given)}}
        if event is not None:
            content["text/event-stream"] = {"schema": {"description": "`data: ` and a "
                                            f"{event.__name__} per event; the last is `data: [DONE]`"}}  # fmt: skip
        body = {"required": True, "content": {"application/json": {"schema": _ref(taken)}}}
        paths[path] = {"post": {**_operation(path, about, content, refused, with_token), "requestBody": body}}
    for path, (about, answer) in _GETS.items():
        kind = "text/plain" if path == "/metrics" else "application/json"
        content = {kind: {"schema": _ref(answer) if answer else {"type": "string" if path == "/metrics" else "object"}}}
        failing = () if path == "/health" else (500,)
        paths[path] = {"get": _operation(path, about, content, failing, with_token and path != "/health")}
    paths["/health"]["get"]["responses"]["503"] = {
        "description": "The server is stopping", "content": {"application/json": {"schema": _ref(Health)}}
    }  # fmt: skip
    scheme = {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}} if with_token else {}
    whole = {"openapi": "3.1.0", "info": {"title": "truetune serve", "version": __version__}, "paths": paths,
             "components": {"schemas": schemas, **scheme}}  # fmt: skip
    return json.dumps(whole)


def _operation(path: str, about: str, content: Mapping[str, Any], refused: Sequence[int], key: bool) -> dict[str, Any]:
    codes = sorted({*refused, *_FOR_ALL, *((401,) if key else ())})
    failure = {"application/json": {"schema": _ref(Failure)}}
    responses = {"200": {"description": "Done", "content": content}}
    responses |= {str(code): {"description": _REFUSALS[code], "content": failure} for code in codes}
    name = path.removeprefix("/v1").strip("/").replace("/", "_").replace(".json", "")
    security: dict[str, Any] = {"security": [{"key": []}]} if key else {}
    return {"operationId": name, "summary": about, "responses": responses, **security}


def _schemas() -> dict[str, Any]:
    taken: list[tuple[type[BaseModel], Any]] = [(post[1], "validation") for post in _POSTS.values()]
    given = [post[2] for post in _POSTS.values()] + [get[1] for get in _GETS.values() if get[1]] + [ChatChunk, Failure]
    # Answers leave out what is not set, so they are described as what could be read back.
    _, found = models_json_schema(
        [*taken, *((model, "validation") for model in given)], ref_template="#/components/schemas/{model}"
    )
    schemas: dict[str, Any] = found["$defs"]
    return schemas


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{model.__name__}"}
