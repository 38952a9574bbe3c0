"""Every request has a trace, and every answer names it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Final

from opentelemetry import context, trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace import NonRecordingSpan, Span, SpanContext, SpanKind, StatusCode, TraceFlags
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.transactions import transaction
from taskmesh import baggage, telemetry
from taskmesh.metrics import catalogue

HEADER: Final = "Taskmesh-Trace-Id"

PROBES: Final = frozenset({"/livez", "/readyz"})
"""Kubernetes asks here every few seconds: such a request has a trace id, and is neither recorded nor measured."""

OTHER_METHOD: Final = "_OTHER"
"""Stands for a method that HTTP does not know, of which a caller can make up any number."""

_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"})
_CARRIERS: Final = {name.encode(): name for name in ("traceparent", "tracestate", "baggage")}
_SERVER_ERROR: Final = 500

_ids = RandomIdGenerator()


class Tracing:
    """ASGI middleware: a server span for each request, its duration, and the trace's name in the answer.

    A trace id costs nothing and links a task's messages and log lines, so tasks have one even when no collector is
    configured; its `sampled` flag is off then, so that no other service exports half a trace.

    The span tells the path but not the query: that says what a caller looks for, and some put their secrets there.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = time.perf_counter()
        carrier = {_CARRIERS[name]: value.decode("latin-1") for name, value in scope["headers"] if name in _CARRIERS}
        parent = telemetry.extract(carrier)
        is_recorded = telemetry.is_exporting() and scope["path"] not in PROBES
        span = _server_span(scope, parent) if is_recorded else _unrecorded(parent)
        token = context.attach(baggage.extract(carrier, trace.set_span_in_context(span)))
        trace_id = trace.format_trace_id(span.get_span_context().trace_id).encode()
        status: int | None = None

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (HEADER.lower().encode(), trace_id)]
            await send(message)

        failure: str | None = None
        try:
            await self._app(scope, receive, named)
        except BaseException as error:
            failure = type(error).__qualname__
            raise
        finally:
            if scope["path"] not in PROBES:
                _end(span, scope, status, failure, time.perf_counter() - begun)
            context.detach(token)


def _server_span(scope: Scope, parent: Context) -> Span:
    method = _method(scope)
    attributes = {"http.request.method": method, "url.path": scope["path"], "url.scheme": scope["scheme"]}
    return telemetry.tracer().start_span(method, parent, SpanKind.SERVER, attributes)


def _unrecorded(parent: Context) -> Span:
    """A span that is exported by nobody: the caller's, or one that no caller's is."""
    ids = trace.get_current_span(parent).get_span_context()
    if not ids.is_valid:
        trace_id, span_id = _ids.generate_trace_id(), _ids.generate_span_id()
        ids = SpanContext(trace_id, span_id, is_remote=False, trace_flags=TraceFlags(0))
    return NonRecordingSpan(ids)


def _end(span: Span, scope: Scope, status: int | None, failure: str | None, seconds: float) -> None:
    """Tell of a request what is known when its answer has left; which route it had is known no earlier."""
    method, route = _method(scope), getattr(scope.get("route"), "path", None)
    if failure is None and status is not None and status >= _SERVER_ERROR:
        failure = str(status)
    code = None if status is None else str(status)
    catalogue.HTTP_SERVER_DURATION.record(
        seconds,
        http_request_method=method,
        http_route=route,
        http_response_status_code=code,
        url_scheme=scope["scheme"],
    )
    if not span.is_recording():
        return
    known = {"http.route": route, "http.response.status_code": status, "error.type": failure}
    span.set_attributes({name: value for name, value in known.items() if value is not None})
    if route is not None:
        span.update_name(f"{method} {route}")
    if failure is not None:
        span.set_status(StatusCode.ERROR)
    span.end()


def _method(scope: Scope) -> str:
    return scope["method"] if scope["method"] in _METHODS else OTHER_METHOD


@contextmanager
def ledger_span() -> Iterator[None]:
    """A span of what is done in the ledger for a request.

    It is not the current one: what is written there was asked for by the request.
    """
    span = telemetry.tracer().start_span("ledger transaction")
    try:
        yield
    except BaseException as error:
        span.set_attribute("error.type", type(error).__qualname__)
        span.set_status(StatusCode.ERROR)
        raise
    finally:
        span.end()


@asynccontextmanager
async def ledger_transaction(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """A `transaction` that changes what becomes of tasks, with a span of its own."""
    with ledger_span():
        async with transaction(engine) as connection:
            yield connection
