"""What a request leaves behind: one server span and one measurement, whatever callers put into it."""

from __future__ import annotations

import httpx
import pytest
from fastapi import FastAPI
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from gateway import tracing
from taskmesh import telemetry
from taskmesh.metrics import instruments

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
CALLER = f"00-{TRACE_ID}-b7ad6b7169203331-01"


class Measured:
    """A sink that keeps what it is given."""

    def __init__(self):
        self.attributes = []
        self.origins = []

    def measure(self, instrument, value, attributes, origin):
        assert instrument.name == "http.server.request.duration"
        assert value >= 0
        self.attributes.append(dict(attributes))
        self.origins.append(origin)


@pytest.fixture
def measured():
    sink = Measured()
    instruments.send_to(sink)
    yield sink
    instruments.send_to(None)


@pytest.fixture
def exporter(monkeypatch):
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(telemetry, "tracer", lambda: provider.get_tracer("test"))
    monkeypatch.setattr(telemetry, "is_exporting", lambda: True)
    return exporter


@pytest.fixture
def http():
    app = FastAPI()

    @app.get("/things/{thing_id}:look")
    async def look(thing_id: str) -> str:
        return telemetry.current_trace_id() or ""

    @app.get("/livez")
    async def livez() -> str:
        return telemetry.current_trace_id() or ""

    @app.get("/busy", status_code=503)
    async def busy() -> str:
        return "later"

    @app.get("/broken")
    async def broken() -> str:
        raise LookupError("secret")

    app.add_middleware(tracing.Tracing)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="https://gateway")


async def test_a_request_is_one_span_of_its_callers_trace_named_after_its_route(http, exporter):
    answer = await http.get("/things/7:look?token=secret", headers={"traceparent": CALLER})

    [span] = exporter.get_finished_spans()
    assert span.name == "GET /things/{thing_id}:look"
    assert span.kind is trace.SpanKind.SERVER
    assert trace.format_span_id(span.parent.span_id) == CALLER.split("-")[2]
    assert dict(span.attributes) == {
        "http.request.method": "GET",
        "http.response.status_code": 200,
        "http.route": "/things/{thing_id}:look",
        "url.path": "/things/7:look",
        "url.scheme": "https",
    }
    assert answer.json() == answer.headers["taskmesh-trace-id"] == TRACE_ID


async def test_a_request_is_measured_with_its_span_as_the_example(http, exporter, measured):
    await http.get("/things/7:look")

    [span] = exporter.get_finished_spans()
    [origin] = measured.origins
    assert origin == span.context
    assert measured.attributes == [
        {
            "http.request.method": "GET",
            "http.response.status_code": "200",
            "http.route": "/things/{thing_id}:look",
            "url.scheme": "https",
        }
    ]


async def test_requests_that_nobody_routes_share_one_name(http, exporter, measured):
    for number in range(3):
        await http.get(f"/made-up/{number}")

    assert {span.name for span in exporter.get_finished_spans()} == {"GET"}
    assert {tuple(sorted(attributes)) for attributes in measured.attributes} == {
        ("http.request.method", "http.response.status_code", "url.scheme")
    }


async def test_methods_that_callers_make_up_share_one_name(http, exporter, measured):
    for method in ("BREW", "PLOUGH"):
        await http.request(method, "/busy")

    assert {span.name for span in exporter.get_finished_spans()} == {"_OTHER /busy"}
    assert {attributes["http.request.method"] for attributes in measured.attributes} == {"_OTHER"}


async def test_a_server_error_is_an_error_of_the_span(http, exporter):
    await http.get("/busy")

    [span] = exporter.get_finished_spans()
    assert (span.status.status_code, span.attributes["error.type"]) == (trace.StatusCode.ERROR, "503")


async def test_a_client_error_is_none_of_the_span(http, exporter):
    await http.get("/nothing")

    [span] = exporter.get_finished_spans()
    assert span.attributes["http.response.status_code"] == 404
    assert span.status.is_unset
    assert "error.type" not in span.attributes


async def test_an_exception_that_escapes_is_told_by_its_class_alone(http, exporter):
    with pytest.raises(LookupError):
        await http.get("/broken")

    [span] = exporter.get_finished_spans()
    assert span.attributes["error.type"] == "LookupError"
    assert span.status.description is None
    assert not span.events


async def test_probes_are_neither_recorded_nor_measured(http, exporter, measured):
    answer = await http.get("/livez", headers={"traceparent": CALLER})

    assert answer.headers["taskmesh-trace-id"] == TRACE_ID
    assert exporter.get_finished_spans() == ()
    assert measured.attributes == []


async def test_without_a_collector_a_trace_has_an_id_and_is_not_sampled(http, measured):
    answer = await http.get("/things/7:look")

    assert answer.json() == answer.headers["taskmesh-trace-id"]
    assert len(answer.json()) == 32
    assert measured.origins == [None]
