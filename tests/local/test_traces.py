"""The trace page: OTLP in, waterfalls and a JSON API out."""

from __future__ import annotations

import gzip

import pytest
from fastapi.testclient import TestClient
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

from taskmesh_local.spans import Spans
from taskmesh_local.traces import application


class Service:
    """A service whose spans go where the test sends them."""

    def __init__(self, name):
        self._spans = InMemorySpanExporter()
        provider = TracerProvider(resource=Resource.create({"service.name": name}))
        provider.add_span_processor(SimpleSpanProcessor(self._spans))
        self._tracer = provider.get_tracer("test")

    def span(self, name, parent=None, *, start, end, kind=SpanKind.INTERNAL, error=None):
        context = set_span_in_context(parent) if parent else None
        span = self._tracer.start_span(name, context, kind, start_time=start * 10**6)
        if error:
            span.set_status(Status(StatusCode.ERROR, error))
        span.end(end * 10**6)
        return span

    def export(self):
        spans = self._spans.get_finished_spans()
        self._spans.clear()
        return encode_spans(spans).SerializeToString()


@pytest.fixture
def page(tmp_path):
    return TestClient(application(Spans(tmp_path / "traces.db")))


@pytest.fixture
def trace(page):
    """A request through two services, exported by each on its own, the second one first."""
    gateway, billing = Service("gateway"), Service("billing-worker")
    root = gateway.span("POST /v1/tasks", start=1000, end=1010, kind=SpanKind.SERVER)
    publish = gateway.span("publish", root, start=1012, end=1014, kind=SpanKind.PRODUCER)
    work = billing.span("process billing.invoice.issue", publish, start=1020, end=1100, kind=SpanKind.CONSUMER)
    billing.span("render", work, start=1030, end=1060, error="no <font>")
    for service in (billing, gateway):
        body = gzip.compress(service.export())
        headers = {"content-type": "application/x-protobuf", "content-encoding": "gzip"}
        assert page.post("/v1/traces", content=body, headers=headers).status_code == 200
    return format(root.get_span_context().trace_id, "032x")


def test_a_trace_of_two_services_is_one_tree_in_the_order_of_the_work(page, trace):
    """Each span stands behind its parent, whatever order the services exported in."""
    shown = page.get(f"/api/traces/{trace}").json()

    assert [(s["name"], s["start_ms"], s["duration_ms"]) for s in shown["spans"]] == [
        ("POST /v1/tasks", 0, 10),
        ("publish", 12, 2),
        ("process billing.invoice.issue", 20, 80),
        ("render", 30, 30),
    ]
    assert shown["services"] == ["gateway", "billing-worker"]
    assert (shown["name"], shown["task"], shown["duration_ms"]) == ("POST /v1/tasks", "billing.invoice.issue", 100)
    assert (shown["errors"], shown["orphans"]) == (1, 0)


def test_the_waterfall_has_a_colour_per_service_and_errors_in_red(page, trace):
    """Positions are shares of the whole; what a span says is text."""
    html = page.get(f"/traces/{trace}").text

    assert 'class="c0" height="12" rx="2"\n          x="0.0%" width="10.0%"' in html
    assert 'class="c1" height="12" rx="2"\n          x="20.0%" width="80.0%"' in html
    assert 'class="failed" height="12" rx="2"\n          x="30.0%" width="30.0%"' in html
    assert "no &lt;font&gt;" in html


def test_a_span_exported_twice_counts_once(page):
    """An exporter that lost our answer sends again."""
    service = Service("gateway")
    service.span("GET /v1/types", start=1, end=2)
    body = service.export()

    for _ in range(2):
        page.post("/v1/traces", content=body)

    assert [trace["spans"] for trace in page.get("/api/traces").json()["items"]] == [1]


def test_a_span_whose_parent_never_came_is_marked(page):
    """A hole in a trace must be seen, not hidden by drawing around it."""
    service = Service("gateway")
    lost = service.span("lost", start=1, end=9)
    service.export()
    service.span("child", lost, start=2, end=3)
    page.post("/v1/traces", content=service.export())

    [trace] = page.get("/api/traces").json()["items"]

    assert trace["orphans"] == 1
    assert "parent missing" in page.get(f"/traces/{trace['trace_id']}").text


def test_the_list_is_searched(page, trace):
    """By service, by any text in a span, by failure, by trace id."""

    def found(query):
        return [item["trace_id"] for item in page.get(f"/api/traces?{query}").json()["items"]]

    assert found("service=billing-worker") == [trace]
    assert found("service=billing") == []
    assert found("q=RENDER&errors=true") == [trace]
    assert found(f"q={trace}") == [trace]
    assert found("q=nowhere") == []


def test_background_work_is_left_out_of_the_page_unless_asked_for(page):
    """Batches of messages are traces of their own; they would drown the requests."""
    service = Service("gateway")
    service.span("process gateway.lifecycle", start=1, end=2, kind=SpanKind.CONSUMER)
    page.post("/v1/traces", content=service.export())

    assert "No trace yet" in page.get("/").text
    assert "process gateway.lifecycle" in page.get("/?background=true").text


def test_reads_are_left_out_of_the_page_unless_they_failed_or_are_asked_for(page):
    """A program that polls would push the requests for work off the page."""
    service = Service("gateway")
    service.span("GET /v1/tasks", start=1, end=2)
    service.span("GET /v1/types", start=3, end=4, error="the database is away")
    page.post("/v1/traces", content=service.export())

    shown = page.get("/").text
    assert "GET /v1/types" in shown
    assert "GET /v1/tasks" not in shown
    assert "GET /v1/tasks" in page.get("/?background=true").text


def test_what_is_no_trace_is_refused_and_other_signals_are_taken(page):
    """An exporter of metrics must not retry for ever; a broken one must hear of it."""
    assert page.post("/v1/traces", content=b"\xff").status_code == 400
    assert page.post("/v1/metrics", content=b"").status_code == 200
    assert page.get("/traces/unknown").status_code == 404
    assert page.get("/api/traces/unknown").status_code == 404
