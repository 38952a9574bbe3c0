"""Traces as the mesh's processes would export them, told span by span through OpenTelemetry's own SDK.

Ids and times are the same in every run, so that what is drawn of them is, too.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.trace import Link, Span, SpanKind, Status, StatusCode, set_span_in_context

# 2026-11-28 11:50:31 UTC.
BEGIN_MS = 1_795_866_631_000.0


class CountedIds(IdGenerator):
    """Ids that look like ids, and come in the same order each time."""

    def __init__(self, seed: str) -> None:
        self._seed = seed
        self._count = 0

    def _next(self) -> uuid.UUID:
        self._count += 1
        return uuid.uuid5(uuid.NAMESPACE_OID, f"{self._seed} {self._count}")

    def generate_trace_id(self) -> int:
        return self._next().int

    def generate_span_id(self) -> int:
        return self._next().int >> 64


@dataclass
class Exports:
    """Several services, each with spans that go where `send` puts their OTLP.

    Attributes:
        send: Takes the body of an export request.
        seed: Names the traces: another seed makes other ids.
        begin_ms: What the times of spans are counted from, in milliseconds since 1970.
    """

    send: Callable[[bytes], Any]
    seed: str = "told"
    begin_ms: float = BEGIN_MS
    _finished: dict[str, InMemorySpanExporter] = field(default_factory=dict)
    _providers: dict[str, TracerProvider] = field(default_factory=dict)

    def span(
        self,
        service: str,
        name: str,
        parent: Span | None = None,
        *,
        start: float,
        end: float,
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Mapping[str, Any] | None = None,
        events: Mapping[str, float] | None = None,
        links: Sequence[tuple[Span, str]] = (),
        error: str | None = None,
        role: str = "worker",
    ) -> Span:
        """Record a span between two moments in milliseconds from the beginning."""
        span = self._tracer(service, role).start_span(
            name,
            set_span_in_context(parent) if parent else None,
            kind,
            attributes=attributes,
            links=[
                Link(other.get_span_context(), {"taskmesh.link": relation} if relation else None)
                for other, relation in links
            ],
            start_time=self._at(start),
        )
        for event, at in (events or {}).items():
            span.add_event(event, timestamp=self._at(at))
        if error:
            span.set_status(Status(StatusCode.ERROR, error))
        span.end(self._at(end))
        return span

    def export(self) -> None:
        """Send what is recorded, one request for each process, as their exporters would."""
        for exporter in reversed(self._finished.values()):
            if spans := exporter.get_finished_spans():
                self.send(encode_spans(spans).SerializeToString())
                exporter.clear()

    @contextmanager
    def exported(self) -> Iterator[Exports]:
        """Send what is recorded in the block."""
        yield self
        self.export()

    def task_id(self, name: str) -> str:
        return str(uuid.uuid5(uuid.NAMESPACE_OID, f"{self.seed} task {name}"))

    def _at(self, milliseconds: float) -> int:
        # Apart, for a float cannot hold today's nanoseconds.
        return round(self.begin_ms * 1000) * 1000 + round(milliseconds * 1e6)

    def _tracer(self, service: str, role: str) -> Any:
        process = f"{service} {role}"
        if process not in self._providers:
            identity = {"service.name": service, "service.version": "0.1.0", "service.instance.id": f"laptop:{process}"}
            provider = TracerProvider(
                resource=Resource(identity | {"taskmesh.role": role}),
                id_generator=CountedIds(f"{self.seed} {process}"),
            )
            self._finished[process] = InMemorySpanExporter()
            provider.add_span_processor(SimpleSpanProcessor(self._finished[process]))
            self._providers[process] = provider
        return self._providers[process].get_tracer("taskmesh")

    # What the mesh's processes say ---------------------------------------------------------------------------------

    def submission(
        self, type_name: str, task: str, *, start: float = 0, took: float = 9, links: Any = (), due: float | None = None
    ) -> Span:
        """A request for a task, its transaction, and the publishing of its message unless it is due later."""
        attributes = {"taskmesh.task.id": self.task_id(task), "taskmesh.task.type": type_name, "http.status_code": 202}
        server = self.span(
            "gateway",
            "POST /v1/tasks",
            start=start,
            end=start + took,
            kind=SpanKind.SERVER,
            attributes=attributes,
            links=links,
            role="api",
        )
        self.span("gateway", "ledger transaction", server, start=start + 2, end=start + took - 1, role="api")
        if due is None:
            self.publish("gateway", "taskmesh.commands", server, start=start + took + 4, task=task)
        return server

    def publish(
        self, service: str, exchange: str, parent: Span | None, *, start: float, task: str, took: float = 3, **more: Any
    ) -> Span:
        attributes = {
            "messaging.system": "rabbitmq",
            "messaging.operation.name": "publish",
            "messaging.operation.type": "send",
            "messaging.destination.name": exchange,
            "messaging.message.id": self.task_id(task),
            "taskmesh.task.id": self.task_id(task),
            "taskmesh.outbox.dwell_ms": 6,
        }
        return self.span(
            service,
            f"publish {exchange}",
            parent,
            start=start,
            end=start + took,
            kind=SpanKind.PRODUCER,
            attributes=attributes,
            role="relay",
            **more,
        )

    def attempt(
        self,
        service: str,
        type_name: str,
        task: str,
        parent: Span | None,
        *,
        due: float,
        start: float,
        end: float,
        number: int = 1,
        outcome: str = "succeeded",
        outbox: float = 6,
        broker: float = 4,
        reason: str | None = None,
        error: str | None = None,
        late: bool = False,
        links: Any = (),
    ) -> Span:
        """One delivery of a task: due, then published, then received, then begun."""
        published, received = due + outbox, due + outbox + broker
        attributes: dict[str, Any] = {
            "messaging.system": "rabbitmq",
            "messaging.operation.name": "process",
            "messaging.operation.type": "process",
            "messaging.destination.name": "taskmesh.commands",
            "messaging.rabbitmq.destination.routing_key": type_name,
            "messaging.message.id": self.task_id(task),
            "taskmesh.task.id": self.task_id(task),
            "taskmesh.task.type": type_name,
            "taskmesh.task.attempt": number,
            "taskmesh.task.redeliveries": 0,
            "taskmesh.outcome": outcome,
            "taskmesh.outbox.dwell_ms": outbox,
            "taskmesh.broker.dwell_ms": broker,
            "taskmesh.prefetch.dwell_ms": start - received,
        }
        if reason:
            attributes["taskmesh.retry.reason"] = reason
        if error:
            attributes["error.type"] = f"{service.replace('-', '_')}.errors.{error}"
        if late:
            attributes["taskmesh.sampled_late"] = True
        return self.span(
            service,
            f"process {type_name}",
            parent,
            start=start,
            end=end,
            kind=SpanKind.CONSUMER,
            attributes=attributes,
            events={"due": due, "published": published, "received": received},
            error=reason_of(error),
            links=links,
        )


def reason_of(error: str | None) -> str | None:
    """The code of a failure, as its exception's class has it: `ProviderUnavailable` is `provider-unavailable`."""
    if error is None:
        return None
    return "".join(f"-{c.lower()}" if c.isupper() else c for c in error).lstrip("-")


def trace_id(span: Span) -> str:
    return format(span.get_span_context().trace_id, "032x")


def span_id(span: Span) -> str:
    return format(span.get_span_context().span_id, "016x")


def retried_task(exports: Exports) -> Span:
    """A document that is rendered at the third attempt."""
    kind, task = "billing.document.render", "retried"
    server = exports.submission(kind, task)
    first = exports.attempt(
        "billing-worker", kind, task, server, due=5, start=42, end=133, outcome="retrying", error="StoreUnavailable"
    )
    exports.span("billing-worker", "render document", first, start=50, end=104)
    exports.span(
        "billing-worker", "store document", first, start=106, end=130, kind=SpanKind.CLIENT, error="connect timeout"
    )
    exports.publish("billing-worker", "taskmesh.direct", server, start=552, task=task)
    second = exports.attempt(
        "billing-worker", kind, task, server, due=540, start=640, end=741, number=2, outbox=12, broker=6,
        outcome="retrying", reason="store-unavailable", error="StoreUnavailable",
    )  # fmt: skip
    exports.span("billing-worker", "render document", second, start=646, end=699)
    exports.span(
        "billing-worker", "store document", second, start=701, end=738, kind=SpanKind.CLIENT, error="connect timeout"
    )
    exports.publish("billing-worker", "taskmesh.direct", server, start=1561, task=task)
    third = exports.attempt(
        "billing-worker", kind, task, server, due=1540, start=1606, end=1742, number=3, outbox=21, broker=5,
        reason="store-unavailable",
    )  # fmt: skip
    exports.span("billing-worker", "render document", third, start=1612, end=1668)
    exports.span("billing-worker", "store document", third, start=1670, end=1704, kind=SpanKind.CLIENT)
    exports.span("billing-worker", "effect transaction", third, start=1608, end=1740)
    return server


def fan_out(exports: Exports) -> Span:
    """An invoice that is issued; its event is heard by two services, and one of them sends a mail."""
    server = exports.submission("billing.invoice.issue", "issue")
    issue = exports.attempt("billing-worker", "billing.invoice.issue", "issue", server, due=6, start=38, end=71)
    exports.span("billing-worker", "effect transaction", issue, start=40, end=69)
    exports.publish("billing-worker", "taskmesh.events", issue, start=78, task="issued")
    mail = exports.attempt(
        "email-worker", "billing.invoice.issued", "heard by email", issue, due=70, start=112, end=139
    )
    exports.span("email-worker", "effect transaction", mail, start=114, end=137)
    book = exports.attempt(
        "ledger-worker", "billing.invoice.issued", "heard by ledger", issue, due=70, start=98, end=121
    )
    exports.span("ledger-worker", "effect transaction", book, start=100, end=119)
    exports.publish("billing-worker", "taskmesh.commands", issue, start=79, task="render")
    render = exports.attempt(
        "billing-worker", "billing.document.render", "render", issue, due=70, start=126, end=243, broker=11
    )
    exports.span("billing-worker", "render document", render, start=132, end=201)
    exports.span("billing-worker", "store document", render, start=203, end=232, kind=SpanKind.CLIENT)
    exports.span("billing-worker", "effect transaction", render, start=128, end=241)
    exports.publish("billing-worker", "taskmesh.events", render, start=250, task="ready")
    ready = exports.attempt("email-worker", "billing.document.ready", "ready", render, due=242, start=284, end=371)
    exports.span("email-worker", "smtp send", ready, start=290, end=358, kind=SpanKind.CLIENT)
    exports.span("email-worker", "effect transaction", ready, start=286, end=369)
    return server


def scheduled_task(exports: Exports, *, later: float = 60_000) -> tuple[Span, Span]:
    """The request for a task of a later time, and the root of the trace in which it ran; both ends have a link."""
    kind, task = "email.message.send", "scheduled"
    server = exports.submission(kind, task, due=later)
    root = exports.publish(
        "gateway", "taskmesh.commands", None, start=later + 4, task=task, links=[(server, "scheduled_by")]
    )
    run = exports.attempt("email-worker", kind, task, root, due=later, start=later + 31, end=later + 77)
    exports.span("email-worker", "smtp send", run, start=later + 35, end=later + 70, kind=SpanKind.CLIENT)
    return server, root


def batches_of(exports: Exports, span: Span, *, start: float = 100) -> tuple[Span, Span]:
    """The relay's batch of reports and the projector's, which both carry something of the span's trace."""
    links = [(span, "")]
    count = {"messaging.batch.message_count": 3, "messaging.destination.name": "taskmesh.lifecycle"}
    relay = exports.span(
        "billing-worker", "publish taskmesh.lifecycle", start=start, end=start + 4, kind=SpanKind.PRODUCER,
        attributes=count, links=links, role="relay",
    )  # fmt: skip
    projector = exports.span(
        "gateway", "process gateway.lifecycle", start=start + 6, end=start + 15, kind=SpanKind.CONSUMER,
        attributes=count, links=links, role="projector",
    )  # fmt: skip
    return relay, projector


def large(exports: Exports, *, spans: int = 1000) -> Span:
    """A request for many tasks, each with three spans."""
    server = exports.span(
        "gateway", "POST /v1/tasks:batchCreate", start=0, end=80, kind=SpanKind.SERVER, role="api",
        attributes={"http.status_code": 200},
    )  # fmt: skip
    for number in range((spans - 1) // 3):
        due = 80 + number
        run = exports.attempt(
            "email-worker", "email.message.send", f"large {number}", server, due=due, start=due + 40, end=due + 90
        )
        exports.span("email-worker", "smtp send", run, start=due + 45, end=due + 80, kind=SpanKind.CLIENT)
        exports.span("email-worker", "effect transaction", run, start=due + 42, end=due + 88)
    for number in range(spans - 1 - 3 * ((spans - 1) // 3)):
        exports.span("gateway", "ledger transaction", server, start=10 + number, end=20 + number, role="api")
    return server
