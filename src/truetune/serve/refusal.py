"""What a client is told when it gets no answer, in OpenAI's form; every refusal of the server is one of these."""

from __future__ import annotations

import json
import logging
from typing import Any

from pydantic import ValidationError

from truetune.errors import TruetuneError

_log = logging.getLogger(__name__)


class Refusal(Exception):  # noqa: N818 - most are no errors of ours
    """A request that is not answered.

    Args:
        status: of HTTP.
        message: the sentence a person reads.
        kind: OpenAI's ``type``.
        param: the field that it is about.
        code: a slug for programs.
        retry_after: seconds after which it is worth another try.
    """

    def __init__(
        self, status: int, message: str, *, kind: str = "invalid_request_error", param: str | None = None,
        code: str | None = None, retry_after: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind
        self.param, self.code = param, code
        self.headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
        if retry_after is not None:
            self.headers["Retry-After"] = str(retry_after)

    @property
    def content(self) -> dict[str, Any]:
        """The JSON body."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def body(self) -> bytes:
        """The same, as it goes over the wire."""
        return json.dumps(self.content, ensure_ascii=True).encode()


def of_error(error: TruetuneError, *, status: int = 400, param: str | None = None, code: str | None = None) -> Refusal:
    """What the library refuses, on one line."""
    notes = "; ".join(f"{label}: {' '.join(text.split())}" for label, text in error.notes)
    kind = "invalid_request_error" if status < 500 else "server_error"
    return Refusal(status, f"{error.message} ({notes})" if notes else error.message, kind=kind, param=param, code=code)


def unavailable(name: str, error: TruetuneError) -> Refusal:
    """An adapter that is there and can't be used: the reason is logged."""
    # It names folders of this machine: it is for who runs the server, not for who asks.
    _log.warning("the adapter %s can't be loaded: %s", name, error)
    said = f"the adapter {name!r} can't be loaded; the server's log says why"
    return Refusal(503, said, kind="server_error", param="model", code="adapter_unavailable")


def too_late(seconds: float) -> Refusal:
    """No answer in time."""
    return Refusal(504, f"no answer within {seconds:g} seconds", kind="server_error", code="timeout")


def of_validation(error: ValidationError) -> Refusal:
    """A body that is no JSON, or not of the form that the route takes: its first fault, and how many more there are."""
    faults = error.errors(include_url=False, include_context=False)
    # Of the alternatives that a field may be, the one that was read furthest is the one that was meant.
    field = faults[0]["loc"][:1]
    same = [fault for fault in faults if fault["loc"][:1] == field]
    first = max(same, key=lambda fault: (len(fault["loc"]), not fault["type"].endswith("_type")))
    if first["type"] == "json_invalid":
        return Refusal(400, f"the body is not valid JSON: {first['msg'].partition(': ')[2] or first['msg']}")
    # Alternatives of a union stand in the path too, and are no part of the field's name.
    param = ".".join(str(part) for part in first["loc"] if isinstance(part, int) or str(part).isidentifier())
    said = {"missing": "is required", "extra_forbidden": "is no field of this route"}.get(first["type"])
    said = said or first["msg"].removeprefix("Value error, ")
    others = len({fault["loc"][:1] for fault in faults}) - 1
    more = f" (and {others} more)" if others else ""
    return Refusal(400, f"{param or 'the body'}: {said}{more}", param=param or None)


def server_fault(message: str) -> Refusal:
    """Something that is no fault of the client's."""
    return Refusal(500, message, kind="server_error")
