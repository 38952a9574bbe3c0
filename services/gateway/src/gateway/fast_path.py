"""The fast path: a plain submission of one task, which is nearly all that a busy gateway is asked for.

FastAPI finds a route among fifty and solves its parameters one by one, for each request anew; that costs more than
committing the task. Here the same request is read by hand. The route `submit_task` remains what declares and documents
it, and what answers every request that is not plain, or not well-formed: it is handed on unread.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from fastapi.routing import APIRoute
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway import problems
from gateway.accepting import Accepted, accept_task
from gateway.bodies import read_json
from gateway.dependencies import Gateway
from gateway.idempotency import MAX_LENGTH
from gateway.problems import Problem
from gateway.schemas import TaskSubmission
from gateway.scopes import Scope as KeyScope
from taskmesh.errors import TaskmeshError

_PLAIN_TYPE: Final = b"application/json"
_SINGLE: Final = frozenset({b"authorization", b"content-type", b"idempotency-key"})
"""Headers that are read here, and must not come twice."""


class FastPath:
    """ASGI middleware: answers plain submissions, and hands all other requests on as they came.

    Args:
        route: What declares the request; its path is the one that is answered here.
    """

    def __init__(self, app: ASGIApp, *, gateway: Gateway, route: APIRoute) -> None:
        self._app = app
        self._gateway = gateway
        self._route = route

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != self._route.path or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        headers = _plain(scope["headers"])
        if headers is None:
            await self._app(scope, receive, send)
            return
        # Whatever comes of it; a route that it is handed on to sets its own.
        scope["route"] = self._route
        accepted, first = None, await _first(receive)
        try:
            if (content := _json(first)) is not None:
                client = await self._gateway.authenticator.authorize(headers.token, KeyScope.TASKS_WRITE)
                if (submission := _submission(content)) is not None:
                    accepted = await accept_task(self._gateway, client, submission, key=headers.idempotency_key)
        except (Problem, TaskmeshError) as error:
            await problems.answer(error, scope["path"])(scope, receive, send)
            return
        if accepted is None:
            await self._app(scope, _again(first, receive), send)
            return
        await send({"type": "http.response.start", "status": 202, "headers": _headers(accepted)})
        await send({"type": "http.response.body", "body": accepted.body})


@dataclass(frozen=True, slots=True)
class _Headers:
    token: str
    idempotency_key: str | None


def _plain(headers: Iterable[tuple[bytes, bytes]]) -> _Headers | None:
    """What the headers of a plain request say; None if they are not those of one."""
    found: dict[bytes, bytes] = {}
    for name, value in headers:
        if name == b"prefer" or (name in _SINGLE and name in found):
            return None
        found[name] = value
    scheme, _, token = found.get(b"authorization", b"").partition(b" ")
    key = found.get(b"idempotency-key")
    if scheme != b"Bearer" or found.get(b"content-type") != _PLAIN_TYPE:
        return None
    if key is not None and not 0 < len(key) <= MAX_LENGTH:
        return None
    return _Headers(token.decode("latin-1").strip(), None if key is None else key.decode("latin-1"))


async def _first(receive: Receive) -> Message | HTTPException:
    """The first piece of the body, or why there is none: it is too large."""
    try:
        return await receive()
    except HTTPException as refusal:
        return refusal


def _json(first: Message | HTTPException) -> Any:
    """The body that is in the first piece; None if it is not all of it, or is not JSON."""
    if isinstance(first, HTTPException) or first["type"] != "http.request" or first.get("more_body", False):
        return None
    try:
        return read_json(first.get("body", b""))
    except ValueError:
        return None


def _submission(content: Any) -> TaskSubmission | None:
    try:
        return TaskSubmission.model_validate(content)
    except ValidationError:
        return None


def _again(first: Message | HTTPException, receive: Receive) -> Receive:
    """A `receive` that begins with what was received already."""
    waiting = [first]

    async def again() -> Message:
        if not waiting:
            return await receive()
        message = waiting.pop()
        if isinstance(message, HTTPException):
            raise message
        return message

    return again


def _headers(accepted: Accepted) -> list[tuple[bytes, bytes]]:
    return [
        (b"content-type", _PLAIN_TYPE),
        (b"content-length", b"%d" % len(accepted.body)),
        *((name.lower().encode(), value.encode()) for name, value in accepted.headers.items()),
    ]
