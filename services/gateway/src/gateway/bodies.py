"""Reading request bodies: how large, of which media type, and as which JSON."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Coroutine
from typing import Any

import pydantic_core
from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.problems import KINDS, Problem, respond

MAX_TASK_BYTES = 128 * 1024
MAX_BATCH_BYTES = 4 * 1024 * 1024
DISCARD_BYTES = 32 * 1024 * 1024
DISCARD_SECONDS = 5
BATCH_PATH = "/v1/tasks:batchCreate"


class BodyLimit:
    """ASGI middleware: refuses a body that is too large as soon as it shows, and keeps no more of it than the limit.

    What is left of the body is read and thrown away, within bounds: closing a connection on data that nobody has read
    resets it, and the caller might never see the answer.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = MAX_BATCH_BYTES if scope["path"] == BATCH_PATH else MAX_TASK_BYTES
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > limit:
            await _discard(receive)
            problem = Problem("payload_too_large", KINDS["payload_too_large"].advice, headers={"Connection": "close"})
            await respond(problem, scope["path"])(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                await _discard(receive)
                # An HTTPException, because FastAPI turns any other error raised while reading into a 400.
                raise HTTPException(413, headers={"Connection": "close"})
            return message

        await self._app(scope, counted, send)


async def _discard(receive: Receive) -> None:
    """Read what is left of a body and forget it, up to 32 MiB and five seconds."""
    left = DISCARD_BYTES
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_SECONDS):
            while left > 0:
                message = await receive()
                left -= len(message.get("body", b""))
                if message["type"] != "http.request" or not message.get("more_body", False):
                    return


def read_json(body: bytes) -> Any:
    """Strict JSON as Python values.

    Raises:
        ValueError: It is none.
    """
    return pydantic_core.from_json(body, allow_inf_nan=False)


class JsonRequest(Request):
    """A request whose body is strict JSON: no NaN, no lone surrogates, no bottomless nesting."""

    async def json(self) -> Any:
        """The body as Python values."""
        if not hasattr(self, "_json"):
            body = await self.body()
            try:
                self._json = read_json(body)
            except ValueError as error:
                # The shape that FastAPI knows as "not JSON"; without the text, which quotes the body.
                raise json.JSONDecodeError("not JSON", "", 0) from error
        return self._json


class JsonRoute(APIRoute):
    """A route that reads strict JSON, and tells callers who send another media type."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            headers = request.headers
            has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
            media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
            if has_body and media_type != "application/json" and not media_type.endswith("+json"):
                raise Problem("unsupported_media_type", "the body's Content-Type must be application/json")
            return await handler(JsonRequest(request.scope, request.receive))

        return strict
