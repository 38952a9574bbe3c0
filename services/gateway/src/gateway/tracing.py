"""Every request has a trace, and every answer names it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from opentelemetry import context, trace
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace import NonRecordingSpan, Span, SpanContext, StatusCode, TraceFlags
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.transactions import transaction
from taskmesh import baggage, telemetry

HEADER = "Taskmesh-Trace-Id"

# Read when the instrumentation begins: http.server.request.duration in seconds, and the attributes that go with it.
os.environ.setdefault("OTEL_SEMCONV_STABILITY_OPT_IN", "http")
# In the old conventions for HTTP and in the new ones.
_WITH_QUERY = frozenset({"http.url", "http.target", "url.full"})
_QUERY = "url.query"

_ids = RandomIdGenerator()


class TraceHeader:
    """ASGI middleware: names the trace in the answer, and begins one where nobody records any.

    A trace id costs nothing and links a task's messages and log lines, so tasks have one even when no collector is
    configured; its `sampled` flag is off then, so that no other service exports half a trace.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        within = baggage.extract(headers, context.get_current())
        if not trace.get_current_span().get_span_context().is_valid:
            within = trace.set_span_in_context(NonRecordingSpan(_context_of(headers)), within)
        token = context.attach(within)
        trace_id = (telemetry.current_trace_id() or "").encode()

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (HEADER.lower().encode(), trace_id)]
            await send(message)

        try:
            await self._app(scope, receive, named)
        finally:
            context.detach(token)


def _context_of(headers: Mapping[str, str]) -> SpanContext:
    remote = trace.get_current_span(telemetry.extract(headers)).get_span_context()
    if remote.is_valid:
        return remote
    return SpanContext(_ids.generate_trace_id(), _ids.generate_span_id(), is_remote=False, trace_flags=TraceFlags(0))


@asynccontextmanager
async def ledger_transaction(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """A `transaction` that changes what becomes of tasks, with a span of its own.

    The span is not the current one: what the transaction writes was asked for by the request.
    """
    span = telemetry.tracer().start_span("ledger transaction")
    try:
        async with transaction(engine) as connection:
            yield connection
    except BaseException as error:
        span.set_attribute("error.type", type(error).__qualname__)
        span.set_status(StatusCode.ERROR)
        raise
    finally:
        span.end()


def instrument(app: FastAPI) -> None:
    """Record one server span for each request; probes make none, and the ASGI sends and receives inside make none."""
    FastAPIInstrumentor.instrument_app(
        app,
        excluded_urls="livez,readyz",
        exclude_spans=["receive", "send"],
        server_request_hook=_drop_query,
    )


def _drop_query(span: Span, scope: dict[str, Any]) -> None:  # noqa: ARG001 - the instrumentation's signature
    """Leave the query out of the span: it says what a caller looks for, and some put their secrets there."""
    attributes = getattr(span, "attributes", None) or {}
    for name in _WITH_QUERY & attributes.keys():
        span.set_attribute(name, str(attributes[name]).partition("?")[0])
    if attributes.get(_QUERY):
        span.set_attribute(_QUERY, "redacted")
