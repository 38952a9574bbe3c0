"""A real OTLP/HTTP receiver for tests, and spans in a form that tests can read."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

from google.protobuf import json_format
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1 import trace_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One received span; ids are lower-case hex, a root's `parent_id` is empty."""

    trace_id: str
    span_id: str
    parent_id: str
    name: str
    kind: str
    service: str
    start_nanoseconds: int
    end_nanoseconds: int
    failed: bool
    message: str = ""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    resource: Mapping[str, Any] = field(default_factory=dict)
    events: tuple[Mapping[str, Any], ...] = ()
    links: tuple[str, ...] = ()

    @property
    def duration_seconds(self) -> float:
        return (self.end_nanoseconds - self.start_nanoseconds) / 1e9


class OtlpSink:
    """Receives `POST /v1/traces` on a free port of 127.0.0.1 until it is left; other signals are taken and dropped."""

    def __init__(self) -> None:
        self._arrived = threading.Condition()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self._keep))
        self._thread = threading.Thread(target=self._server.serve_forever, name="otlp-sink", daemon=True)
        self.spans: list[Span] = []

    @property
    def endpoint(self) -> str:
        """In the form of OTEL_EXPORTER_OTLP_ENDPOINT: exporters add `/v1/traces` to it."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def wait_for(
        self,
        count: int = 1,
        timeout_seconds: float = 10,
        *,
        name: str | None = None,
        where: Callable[[Span], bool] | None = None,
    ) -> list[Span]:
        """Return the spans that match, as soon as there are `count` of them.

        Raises:
            TimeoutError: There are fewer after the time.
        """

        def matching() -> list[Span]:
            return [s for s in self.spans if (name is None or s.name == name) and (where is None or where(s))]

        with self._arrived:
            if not self._arrived.wait_for(lambda: len(matching()) >= count, timeout_seconds):
                seen = sorted({span.name for span in self.spans})
                raise TimeoutError(f"{len(matching())} of {count} spans within {timeout_seconds} s; names seen: {seen}")
            return matching()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)

    def _keep(self, spans: list[Span]) -> None:
        with self._arrived:
            self.spans.extend(spans)
            self._arrived.notify_all()


def read_spans(body: bytes, *, content_type: str = "application/x-protobuf", content_encoding: str = "") -> list[Span]:
    """The spans of an OTLP export request, protobuf or JSON, gzipped or not.

    Raises:
        ValueError: The body is not what its headers say.
    """
    try:
        raw = gzip.decompress(body) if content_encoding == "gzip" else body
        if "json" in content_type:
            request = ExportTraceServiceRequest()
            json_format.Parse(_hex_ids_as_base64(raw), request, ignore_unknown_fields=True)
        else:
            request = ExportTraceServiceRequest.FromString(raw)
    except Exception as error:
        # gzip, json and protobuf each raise their own; all of them mean the same to the sender.
        raise ValueError(f"not an OTLP trace export: {error}") from error
    return [
        _span(span, resource)
        for group in request.resource_spans
        for resource in [_attributes(group.resource.attributes)]
        for scope in group.scope_spans
        for span in scope.spans
    ]


def _span(span: trace_pb2.Span, resource: dict[str, Any]) -> Span:
    return Span(
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        name=span.name,
        kind=trace_pb2.Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_").lower(),
        service=str(resource.get("service.name", "unknown")),
        start_nanoseconds=span.start_time_unix_nano,
        end_nanoseconds=span.end_time_unix_nano,
        failed=span.status.code == trace_pb2.Status.STATUS_CODE_ERROR,
        message=span.status.message,
        attributes=_attributes(span.attributes),
        resource=resource,
        events=tuple(
            {"name": event.name, "at_nanoseconds": event.time_unix_nano, "attributes": _attributes(event.attributes)}
            for event in span.events
        ),
        links=tuple(link.trace_id.hex() for link in span.links),
    )


def _attributes(pairs: Iterable[KeyValue]) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: AnyValue) -> Any:  # An attribute may be anything JSON knows.
    match value.WhichOneof("value"):
        case "array_value":
            return [_value(item) for item in value.array_value.values]
        case "kvlist_value":
            return _attributes(value.kvlist_value.values)
        case None:
            return None
        case name:
            return getattr(value, name)


def _hex_ids_as_base64(raw: bytes) -> str:
    """OTLP's JSON writes ids in hex, where protobuf's own JSON mapping expects base64.

    https://opentelemetry.io/docs/specs/otlp/#json-protobuf-encoding
    """
    import base64
    import json

    def convert(node: Any) -> Any:
        if isinstance(node, list):
            return [convert(item) for item in node]
        if not isinstance(node, dict):
            return node
        return {
            key: base64.b64encode(bytes.fromhex(value)).decode()
            if key in {"traceId", "spanId", "parentSpanId"} and isinstance(value, str)
            else convert(value)
            for key, value in node.items()
        }

    return json.dumps(convert(json.loads(raw)))


def _handler(keep: Callable[[list[Span]], None]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            content_type = self.headers.get("Content-Type", "application/x-protobuf")
            status = 200
            if self.path == "/v1/traces":
                try:
                    keep(
                        read_spans(
                            body,
                            content_type=content_type,
                            content_encoding=self.headers.get("Content-Encoding", ""),
                        )
                    )
                except ValueError:
                    status = 400
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            answer = b"{}" if "json" in content_type else b""
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's name
            """Keep the test's output clean."""

    return Handler
