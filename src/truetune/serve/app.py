"""The application: which path leads where, and what every request passes on its way in and out."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from truetune.serve.limits import Body, Door, read_body
from truetune.serve.refusal import Refusal, of_validation, server_fault
from truetune.serve.service import Service
from truetune.serve.stream import ClientLeftError

_log = logging.getLogger(__name__)
_LEFT = 499  # as nginx counts requests whose client left; it is never sent

Read = Callable[[Scope, Receive, Send], Awaitable[None]]
Taking = Callable[[bytes, Scope, Receive, Send], Awaitable[None]]


def application(service: Service, door: Door) -> ASGIApp:
    """All routes, behind the door."""
    posts = {
        "/v1/chat/completions": service.chat,
        "/v1/completions": service.completion,
        "/v1/embeddings": service.embedding,
    }
    gets = {
        "/v1/models": service.models,
        "/health": service.health,
        "/metrics": service.figures,
        "/openapi.json": service.openapi,
    }
    routes = [Route(path, _Take(take, service), methods=["POST"]) for path, take in posts.items()]
    routes += [Route(path, _Give(give), methods=["GET"]) for path, give in gets.items()]
    return _Hall(Router(routes, redirect_slashes=False), door, service, frozenset([*posts, *gets]))


class _Give:
    """A route without a body, as the application that a route may be."""

    def __init__(self, give: Read) -> None:
        self.give = give

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.give(scope, receive, send)


class _Take:
    """A route that takes JSON."""

    def __init__(self, take: Taking, service: Service) -> None:
        self.take, self.service = take, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.service.gate.check_open()
        config = self.service.config
        body = await read_body(scope, receive, most=config.body_bytes, seconds=config.max_stall)
        try:
            await self.take(body, scope, receive, send)
        except ValidationError as error:
            raise of_validation(error) from None


class _Hall:
    """Around everything: who may come in, what a failure looks like, and what is counted."""

    def __init__(self, app: ASGIApp, door: Door, service: Service, paths: frozenset[str]) -> None:
        self.app, self.door, self.metrics, self.paths = app, door, service.metrics, paths
        self.body_bytes = service.config.body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        status: list[int] = []
        body = Body(scope, receive)

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                status.append(message["status"])
                await body.pass_over(most=self.body_bytes)
                if not body.is_read:  # what has not come yet is not waited for
                    message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
            await send(message)

        try:
            self.door.check(scope)
            # Without an app of its own the router answers in its own words.
            await self.app({**scope, "app": self}, body.receive, watched)
        except ClientLeftError:
            status[:] = [_LEFT]
        except HTTPException as error:
            await _refuse(_not_here(error, scope), scope, receive, watched, begun=bool(status))
        except Refusal as refusal:
            await _refuse(refusal, scope, receive, watched, begun=bool(status))
        except Exception:
            _log.exception("a request failed")
            await _refuse(server_fault("this is a fault of the server's; its log says where"), scope, receive, watched,
                          begun=bool(status))  # fmt: skip
        finally:
            path = scope["path"] if scope["path"] in self.paths else "other"
            self.metrics.requests[path, status[0] if status else _LEFT] += 1


async def _refuse(refusal: Refusal, scope: Scope, receive: Receive, send: Send, *, begun: bool) -> None:
    if begun or refusal.status == _LEFT:
        return
    await Response(refusal.body, refusal.status, refusal.headers, "application/json")(scope, receive, send)


def _not_here(error: HTTPException, scope: Scope) -> Refusal:
    said = {404: f"there is nothing at {scope['path'][:120]}", 405: f"{scope['method']} is not for this path"}
    refusal = Refusal(error.status_code, said.get(error.status_code, str(error.detail)))
    refusal.headers.update(error.headers or {})
    return refusal
