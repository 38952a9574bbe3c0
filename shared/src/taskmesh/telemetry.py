"""OpenTelemetry: one trace from the caller's request to the last effect.

The API is used everywhere; the SDK is set up here, once in each process that does work. Without
`OTEL_EXPORTER_OTLP_ENDPOINT` nothing is exported and nothing is waited for.

Spans, attributes and metrics are listed in docs/telemetry.md.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version

from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from taskmesh import baggage, exporting
from taskmesh.metrics import catalogue
from taskmesh.metrics import provider as metrics
from taskmesh.recording import SpanRecorder
from taskmesh.settings import ServiceSettings

ENDPOINT_VARIABLE = "OTEL_EXPORTER_OTLP_ENDPOINT"

SCHEMA_URL = "https://opentelemetry.io/schemas/1.44.0"
"""The semantic conventions that spans follow; those for messaging are not stable yet, hence a pinned version."""

TRACE_CONTEXT = TraceContextTextMapPropagator()

_provider: TracerProvider | None = None
_tracer: Tracer | None = None


def start(service: str, role: str, settings: ServiceSettings, *, with_metrics: bool = True) -> None:
    """Begin to record and export spans and metrics under `service.name`.

    Args:
        service: `service.name`.
        role: Of the service.
        settings: What of a caller's baggage goes along, and where metrics are shown.
        with_metrics: False in a pool child, whose parent exports them; its spans it exports itself.
    """
    global _provider, _tracer  # noqa: PLW0603 - OpenTelemetry's own provider is a process-wide global too
    propagate.set_global_textmap(TRACE_CONTEXT)
    baggage.allow(settings.baggage_allowed)
    if with_metrics:
        metrics.start(resource(service, role), release(), settings)
    if not os.environ.get(ENDPOINT_VARIABLE):
        return
    # Its sampler is what `OTEL_TRACES_SAMPLER` chooses; parent-based unless it says otherwise.
    _provider = TracerProvider(resource=resource(service, role))
    sender = exporting.processor(_dropped)
    # For the spans of other libraries; the mesh's own go to the sender without it.
    _provider.add_span_processor(sender)
    trace.set_tracer_provider(_provider)
    scope = InstrumentationScope("taskmesh", release(), SCHEMA_URL)
    _tracer = SpanRecorder(_provider.sampler, _provider.resource, scope, sender.put)


def stop() -> None:
    """Export what is recorded; called last in an orderly shutdown."""
    if _provider is not None:
        _provider.shutdown()
    metrics.stop()


def resource(service: str, role: str) -> Resource:
    """Who this process is, in everything that it exports."""
    return Resource.create(
        {
            "service.name": service,
            "service.version": release(),
            "service.instance.id": f"{socket.gethostname()}:{os.getpid()}",
            "taskmesh.role": role,
        }
    )


def _dropped(count: int) -> None:
    catalogue.TELEMETRY_DROPPED.add(count, signal="traces")


@cache
def release() -> str:
    """The version of the library, which is also the version of the mesh."""
    try:
        return version("taskmesh")
    except PackageNotFoundError:
        return "unknown"


def tracer() -> Tracer:
    """The mesh's tracer."""
    return _tracer or trace.get_tracer("taskmesh", release(), schema_url=SCHEMA_URL)


def is_exporting() -> bool:
    """True if this process exports spans."""
    return _provider is not None


def current_traceparent() -> str | None:
    """The W3C `traceparent` of the current span, or None outside any."""
    carrier: dict[str, str] = {}
    TRACE_CONTEXT.inject(carrier)
    return carrier.get("traceparent")


def current_trace_id() -> str | None:
    """The current trace's id in 32 hex digits, or None outside any."""
    span = trace.get_current_span().get_span_context()
    return trace.format_trace_id(span.trace_id) if span.is_valid else None


def extract(carrier: Mapping[str, object]) -> Context:
    """The context that a message's or request's headers carry; an empty one when they carry none."""
    names = ("traceparent", "tracestate")
    plain = {name: value for name in names if isinstance(value := carrier.get(name), str)}
    if not plain:
        return Context()
    return TRACE_CONTEXT.extract(plain, context=Context())
