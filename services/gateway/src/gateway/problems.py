"""Every error the gateway answers with, as RFC 9457 problem documents.

A problem's `type` is a page of this gateway that explains it. No problem repeats a value that the caller sent.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.routing import BaseRoute, Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from taskmesh import telemetry
from taskmesh.errors import ConflictError, NotFound, PermanentError, TaskmeshError, TransientError

logger = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
MAX_ERRORS = 20
METHOD_NOT_ALLOWED: Final = 405
DEFAULT_RETRY_SECONDS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind of problem: what it is called, and what to do about it."""

    code: str
    status: int
    title: str
    advice: str


_KINDS: Final = (
    Kind(
        code="unknown_type",
        status=404,
        title="No worker has announced this task type",
        advice="See GET /v1/types for the types there are; `nearest` names those that read alike.",
    ),
    Kind(
        code="contract_violation",
        status=422,
        title="The payload does not fit the contract of its type",
        advice="`errors` points at each field; GET /v1/types/{type} has the JSON Schema. Nothing was stored.",
    ),
    Kind(
        code="invalid_request",
        status=422,
        title="The request is not well formed",
        advice="`errors` points at each field. Status 400 means that the body could not be read as JSON at all.",
    ),
    Kind(
        code="idempotency_conflict",
        status=409,
        title="The idempotency key was used for another request",
        advice="Use a new key for new work, and the same key only for the very same request.",
    ),
    Kind(
        code="not_failed",
        status=409,
        title="Only a task that failed, was cancelled or expired is tried again",
        advice="Wait for its end, or cancel it; to have work done once more that succeeded, submit a new task.",
    ),
    Kind(
        code="already_retried",
        status=409,
        title="The task was tried again already",
        advice="`detail` names the newest try, and `retried_as` of each task the next one. If it fails, repeat this.",
    ),
    Kind(
        code="payload_unknown",
        status=409,
        title="The gateway never saw the payload of this task",
        advice="Send the payload with the request.",
    ),
    Kind(
        code="force_not_allowed",
        status=409,
        title="Running tasks of this type may not be killed",
        advice="Cancel without `force`, or have the type announce `force_cancel`.",
    ),
    Kind(
        code="already_resolved",
        status=409,
        title="The dead letter was replayed or discarded already",
        advice="A letter is resolved once. `Location` leads to the task that it was replayed as, if it was.",
    ),
    Kind(
        code="unreadable",
        status=422,
        title="The dead letter cannot be read",
        advice="Send it again with the `type` and the `payload` that it should have had.",
    ),
    Kind(
        code="conflict",
        status=409,
        title="The request contradicts what is stored",
        advice="Read the resource again and decide anew.",
    ),
    Kind(
        code="unauthenticated",
        status=401,
        title="The API key is missing, unknown or revoked",
        advice="Send `Authorization: Bearer <api key>`.",
    ),
    Kind(
        code="forbidden",
        status=403,
        title="The API key lacks the scope for this request",
        advice="Ask the gateway's operators for a key with the scope that `detail` names.",
    ),
    Kind(
        code="not_found",
        status=404,
        title="There is no such resource",
        advice="Check the address and the id.",
    ),
    Kind(
        code="method_not_allowed",
        status=405,
        title="The resource does not know this method",
        advice="The `Allow` header names the methods it knows.",
    ),
    Kind(
        code="payload_too_large",
        status=413,
        title="The request is too large",
        advice="A task may have 128 KiB, a batch 4 MiB. Put large things into an object store and send a reference.",
    ),
    Kind(
        code="unsupported_media_type",
        status=415,
        title="The body must be JSON",
        advice="Send `Content-Type: application/json`.",
    ),
    Kind(
        code="database_unavailable",
        status=503,
        title="The ledger cannot be reached at the moment",
        advice="Nothing was accepted. Repeat with the same idempotency key after `Retry-After` seconds.",
    ),
    Kind(
        code="reconciler_silent",
        status=503,
        title="No reconciler has finished an audit in time",
        advice="See that the role `reconciler` runs. GET /v1/reconciliation has the last audit.",
    ),
    Kind(
        code="outstanding_unknown",
        status=503,
        title="What the service has to do cannot be known at the moment",
        advice="Keep as many workers as there are. See that `reconciler` and `projector` run and reach the broker.",
    ),
    Kind(
        code="internal",
        status=500,
        title="The gateway failed",
        advice="Report the `trace_id`. Whether work was accepted is unknown; repeat with the same idempotency key.",
    ),
)
KINDS: Final[Mapping[str, Kind]] = {kind.code: kind for kind in _KINDS}


class FieldError(BaseModel):
    """What is wrong with one field."""

    pointer: str
    """JSON Pointer (RFC 6901) into the request's body."""
    detail: str


class ProblemDocument(BaseModel):
    """RFC 9457 problem details."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    instance: str
    trace_id: str | None = None
    errors: list[FieldError] | None = None
    nearest: list[str] | None = None


class Problem(Exception):
    """Ends a request with a problem document.

    Args:
        code: One of `KINDS`.
        status: Instead of the kind's own.
        errors: At most 20 are shown.
    """

    def __init__(
        self,
        code: str,
        detail: str,
        *,
        status: int | None = None,
        errors: Sequence[FieldError] = (),
        nearest: Sequence[str] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.kind = KINDS[code]
        self.status = status or self.kind.status
        self.detail = detail
        self.errors = list(errors)[:MAX_ERRORS]
        self.nearest = list(nearest)
        self.headers = dict(headers or {})


def respond(problem: Problem, path: str) -> JSONResponse:
    """The problem as a response."""
    document = ProblemDocument(
        type=f"/problems/{problem.kind.code}",
        title=problem.kind.title,
        status=problem.status,
        detail=problem.detail,
        code=problem.kind.code,
        instance=quote(path, safe="/:"),
        trace_id=telemetry.current_trace_id(),
        errors=problem.errors or None,
        nearest=problem.nearest or None,
    )
    return JSONResponse(
        document.model_dump(exclude_none=True), problem.status, headers=problem.headers, media_type=MEDIA_TYPE
    )


def declare(*codes: str) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that may end in these problems, for OpenAPI; those of every route are added."""
    declared: dict[int | str, dict[str, Any]] = {}
    for code in (*codes, "unauthenticated", "forbidden", "database_unavailable", "internal"):
        kind = KINDS[code]
        known = declared.get(kind.status)
        title = f"{known['description']}; or: {kind.title}" if known else kind.title
        declared[kind.status] = {
            "description": title,
            "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/ProblemDocument"}}},
        }
    return declared


def pointer(parts: Sequence[str | int]) -> str:
    """A JSON Pointer from the steps to a field."""
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in parts)


def translate(error: TaskmeshError) -> Problem:
    """The problem that an error of the mesh means for a caller."""
    match error:
        case TransientError():
            seconds = math.ceil(error.retry_after.total_seconds()) if error.retry_after else DEFAULT_RETRY_SECONDS
            return Problem("database_unavailable", str(error), headers={"Retry-After": str(max(1, seconds))})
        case NotFound():
            return Problem("not_found", str(error))
        case ConflictError():
            return Problem(error.code if error.code in KINDS else "conflict", str(error))
        case PermanentError():
            return Problem("contract_violation", str(error))
        case _:
            return Problem("internal", "an unexpected error; the trace id finds it in the logs")


def answer(error: Problem | TaskmeshError, path: str) -> JSONResponse:
    """The response to a request that is refused."""
    if isinstance(error, Problem):
        return respond(error, path)
    if isinstance(error, TransientError):
        logger.warning("request refused", extra={"code": error.code, "path": path})
    return respond(translate(error), path)


def install(app: FastAPI, routes: Iterable[BaseRoute]) -> None:
    """Answer every error of the application, which has these routes, with a problem document."""
    known = [route for route in routes if isinstance(route, Route)]

    async def on_refusal(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, Problem | TaskmeshError)
        return answer(error, request.scope["path"])

    async def on_http_exception(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        if error.status_code == METHOD_NOT_ALLOWED:
            # Starlette names the methods of the first route of an address only.
            here = [route for route in known if route.matches(request.scope)[0] is not Match.NONE]
            error.headers = {"Allow": ", ".join(sorted({method for route in here for method in route.methods or ()}))}
        return _respond_to_http(request, error)

    app.add_exception_handler(Problem, on_refusal)
    app.add_exception_handler(TaskmeshError, on_refusal)
    app.add_exception_handler(RequestValidationError, _on_invalid_request)
    app.add_exception_handler(HTTPException, on_http_exception)


async def _on_invalid_request(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    problems = error.errors()
    if any(problem["type"] == "json_invalid" for problem in problems):
        return respond(Problem("invalid_request", "the body is not JSON", status=400), request.scope["path"])
    # Pydantic's messages speak of limits and types; `input` and `ctx` hold the value and are left out.
    errors = [FieldError(pointer=_location(problem["loc"]), detail=_message(problem)) for problem in problems]
    return respond(Problem("invalid_request", "fields are missing or wrong", errors=errors), request.scope["path"])


def _location(location: Sequence[str | int]) -> str:
    # The first step says where FastAPI looked: body, query, path or header.
    where, *rest = location
    return pointer(rest) if where == "body" else pointer([f"{where}:{rest[0]}" if rest else str(where), *rest[1:]])


def _message(problem: Mapping[str, Any]) -> str:
    # These kinds quote the value, or the parser's view of it.
    quoting = {"uuid_parsing": "must be a UUID", "datetime_from_date_parsing": "must be an RFC 3339 time"}
    message = quoting.get(problem["type"], str(problem["msg"]))
    return message.removeprefix("Value error, ")


def _respond_to_http(request: Request, error: HTTPException) -> JSONResponse:
    by_status = {
        400: "invalid_request",
        404: "not_found",
        METHOD_NOT_ALLOWED: "method_not_allowed",
        413: "payload_too_large",
        415: "unsupported_media_type",
    }
    code = by_status.get(error.status_code)
    if code is None:
        logger.error("unforeseen HTTP error", extra={"status": error.status_code, "path": request.scope["path"]})
        return respond(Problem("internal", "an unexpected error"), request.scope["path"])
    headers = dict(error.headers or {})
    details = {
        "not_found": "nothing is found at this address; GET /openapi.json tells what there is",
        "method_not_allowed": f"this address knows {headers.get('Allow')}",
        "invalid_request": "the request could not be read",
    }
    problem = Problem(code, details.get(code, KINDS[code].advice), status=error.status_code, headers=headers)
    return respond(problem, request.scope["path"])


class UnexpectedErrors:
    """ASGI middleware: what nobody foresaw becomes a 500 problem, and a log line with the stack but no values."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def observed(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, observed)
        except Exception as error:
            logger.exception("request failed", extra={"path": scope["path"], "exception": type(error).__qualname__})
            if started:
                # The status line has left; cutting the connection is the only way to say that the rest is missing.
                raise
            response = respond(Problem("internal", "an unexpected error; the trace id finds it"), scope["path"])
            await response(scope, receive, send)
