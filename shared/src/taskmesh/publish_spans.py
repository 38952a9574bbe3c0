"""The spans of a relay: one for each message that it published.

A span is made when it is written down what became of its row. It lasts from the row's claim to the broker's answer, and
is the child of the span that wrote the message, beside the work, or the root of the trace that begins with the
message. A message of reports belongs to no one trace; its span links to those of the reports.

See https://opentelemetry.io/docs/specs/semconv/messaging/rabbitmq/.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Protocol
from uuid import UUID

from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, StatusCode
from pydantic import SecretStr

from taskmesh import amqp, exchanges, telemetry, traces
from taskmesh.celery_protocol import TRACE_LINKS_HEADER
from taskmesh.publishing import Outcome, Report
from taskmesh.recording import promised


class Row(Protocol):
    """What is looked at in a row of the outbox."""

    @property
    def due_at(self) -> datetime: ...
    @property
    def exchange(self) -> str: ...
    @property
    def routing_key(self) -> str: ...
    @property
    def headers(self) -> Mapping[str, Any]: ...
    @property
    def properties(self) -> Mapping[str, Any]: ...
    @property
    def task_id(self) -> UUID | None: ...


class PublishSpans:
    """Makes them for one broker."""

    def __init__(self, amqp_url: SecretStr | str) -> None:
        parameters = amqp.parameters(amqp_url, name="")
        self._constant: dict[str, Any] = {
            "server.address": parameters.host,
            "server.port": parameters.port,
            "messaging.system": "rabbitmq",
            "messaging.operation.name": "publish",
            "messaging.operation.type": "send",
        }

    def record(self, rows: Sequence[Row], report: Report, *, claimed_ns: int) -> None:
        """Record that a message with these rows was published, or was not."""
        if not telemetry.is_exporting():
            return
        row = rows[0]
        if row.exchange == exchanges.LIFECYCLE:
            span = self._of_reports(rows, claimed_ns)
        elif "traceparent" in row.headers:
            span = self._of_message(row, report, claimed_ns)
        else:
            return
        # From when it could have left until the answer.
        dwell_ns = report.settled_ns - row.due_at.timestamp() * 1e9
        span.set_attribute("taskmesh.outbox.dwell_ms", max(0.0, round(dwell_ns / 1e6, 3)))
        if report.outcome is not Outcome.CONFIRMED:
            span.set_attribute("error.type", report.outcome.value)
            span.set_status(StatusCode.ERROR, report.reason)
        span.end(end_time=report.settled_ns)

    def _of_reports(self, rows: Sequence[Row], begun_ns: int) -> Span:
        linked = {traceparent for row in rows if (traceparent := row.headers.get("traceparent"))}
        return telemetry.tracer().start_span(
            f"publish {exchanges.LIFECYCLE}",
            context=Context(),
            kind=SpanKind.PRODUCER,
            links=traces.members(linked),
            attributes={**self._addressed(rows[0]), "messaging.batch.message_count": len(rows)},
            start_time=begun_ns,
        )

    def _of_message(self, row: Row, report: Report, begun_ns: int) -> Span:
        attributes = self._addressed(row)
        if message_id := row.properties.get("message_id"):
            attributes["messaging.message.id"] = str(message_id)
        if row.task_id is not None:
            attributes["taskmesh.task.id"] = str(row.task_id)
        links = row.headers.get(TRACE_LINKS_HEADER)
        if not links:
            return self._start(row, attributes, begun_ns, parent=row.headers["traceparent"])
        if report.outcome is not Outcome.CONFIRMED:
            # The trace begins when the message leaves; that it did not is news for whoever asked.
            return self._start(row, attributes, begun_ns, parent=next(iter(links.values())))
        with promised(traces.context_of(row.headers["traceparent"])):
            return telemetry.tracer().start_span(
                f"publish {row.exchange}",
                context=Context(),
                kind=SpanKind.PRODUCER,
                links=traces.links_to(links),
                attributes=attributes,
                start_time=begun_ns,
            )

    def _start(self, row: Row, attributes: dict[str, Any], begun_ns: int, *, parent: str) -> Span:
        return telemetry.tracer().start_span(
            f"publish {row.exchange}",
            context=telemetry.extract({"traceparent": parent}),
            kind=SpanKind.PRODUCER,
            attributes=attributes,
            start_time=begun_ns,
        )

    def _addressed(self, row: Row) -> dict[str, Any]:
        return {
            **self._constant,
            "messaging.destination.name": f"{row.exchange}:{row.routing_key}",
            "messaging.rabbitmq.destination.routing_key": row.routing_key,
        }
