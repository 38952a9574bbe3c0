"""The span of an attempt: one for each delivery, with what the task has waited for before it.

An attempt that fails or is slow is exported even when its trace is not sampled (`taskmesh.sampled_late`): whoever looks
for what went wrong last night must find it at any sampling rate.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Final, Self

from opentelemetry import context, trace
from opentelemetry.trace import NonRecordingSpan, Span, SpanContext, SpanKind, StatusCode, TraceFlags

from taskmesh import baggage, telemetry
from taskmesh.celery_protocol import DUE_HEADER, PUBLISHED_HEADER, RECEIVED_HEADER

WAITS: Final = (
    ("due", DUE_HEADER, "taskmesh.outbox.dwell_ms"),
    ("published", PUBLISHED_HEADER, "taskmesh.broker.dwell_ms"),
    ("received", RECEIVED_HEADER, "taskmesh.prefetch.dwell_ms"),
)
"""What a message has come past, the header that says when, and the name of the wait that began there."""


class AttemptSpan:
    """The current span while a delivery is worked on.

    Args:
        task_type: Names the span.
        headers: The message's.
        attributes: What is known of the attempt.
        slow_seconds: From how long on an attempt counts as slow.
    """

    def __init__(
        self, task_type: str, headers: Mapping[str, Any], attributes: dict[str, Any], *, slow_seconds: float
    ) -> None:
        self._name = f"process {task_type}"
        self._parent = telemetry.extract(headers)
        self._headers = headers
        self._attributes = attributes
        self._slow_ns = slow_seconds * 1e9
        self._error: str | None = None

    def __enter__(self) -> Self:
        self._begun_ns = time.time_ns()
        self._span = telemetry.tracer().start_span(
            self._name, self._parent, SpanKind.CONSUMER, self._attributes, start_time=self._begun_ns
        )
        if self._span.is_recording():
            self._tell_waits(self._span)
        within = baggage.extract(self._headers, self._parent)
        self._token = context.attach(trace.set_span_in_context(self._span, within))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # No exception is recorded: its text may quote a payload, and Ignore is how a settled attempt leaves Celery.
        context.detach(self._token)
        ended_ns = time.time_ns()
        if self._span.is_recording():
            self._span.end(ended_ns)
        elif telemetry.is_exporting() and (self._error or ended_ns - self._begun_ns >= self._slow_ns):
            self._export_late(ended_ns)

    def set(self, name: str, value: str | float) -> None:
        """Say something more of the attempt."""
        self._attributes[name] = value
        self._span.set_attribute(name, value)

    def fail(self, code: str, error_type: str) -> None:
        """Mark the attempt as failed."""
        self._error = code
        self._span.set_status(StatusCode.ERROR, code)
        self.set("error.type", error_type)

    def _tell_waits(self, span: Span) -> None:
        """Events at their own times, before the span's start, and the waits between them as attributes."""
        times = [
            (event, wait, at_us * 1000) for event, header, wait in WAITS if (at_us := _time_us(self._headers, header))
        ]
        until = [*(at_ns for _, _, at_ns in times[1:]), self._begun_ns]
        # A message of plain Celery says nothing but when it was received.
        for (event, wait, at_ns), next_ns in zip(times, until, strict=False):
            span.add_event(event, timestamp=at_ns)
            # Clocks of two machines differ.
            span.set_attribute(wait, max(0.0, (next_ns - at_ns) / 1e6))

    def _export_late(self, ended_ns: int) -> None:
        parent = trace.get_current_span(self._parent).get_span_context()
        sampled = SpanContext(
            parent.trace_id, parent.span_id, is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED)
        )
        span = telemetry.tracer().start_span(
            self._name,
            trace.set_span_in_context(NonRecordingSpan(sampled)),
            SpanKind.CONSUMER,
            {**self._attributes, "taskmesh.sampled_late": True},
            start_time=self._begun_ns,
        )
        self._tell_waits(span)
        if self._error:
            span.set_status(StatusCode.ERROR, self._error)
        span.end(ended_ns)


def _time_us(headers: Mapping[str, Any], name: str) -> int:
    value = headers.get(name)
    return value if isinstance(value, int) and 0 < value < 2**53 else 0
