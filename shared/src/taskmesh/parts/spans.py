"""Spans as they come over OTLP, in a form that a page can show and a test can read."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from google.protobuf import json_format
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1 import trace_pb2


@dataclass(frozen=True, slots=True)
class SpanLink:
    """What a span says of a span elsewhere, most often of another trace."""

    trace_id: str
    span_id: str
    attributes: Mapping[str, Any] = field(default_factory=dict)


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
    links: tuple[SpanLink, ...] = ()

    @property
    def duration_seconds(self) -> float:
        return (self.end_nanoseconds - self.start_nanoseconds) / 1e9


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
        links=tuple(
            SpanLink(link.trace_id.hex(), link.span_id.hex(), _attributes(link.attributes)) for link in span.links
        ),
    )


def _attributes(pairs: Iterable[KeyValue]) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: AnyValue) -> Any:  # An attribute may be anything JSON knows.
    match value.WhichOneof("value"):
        case "array_value":
            return [_value(item) for item in value.array_value.values]
        case "kvlist_value":
            return _attributes(value.kvlist_value.values)
        case "bytes_value":
            return base64.b64encode(value.bytes_value).decode()
        case None:
            return None
        case name:
            return getattr(value, name)


def _hex_ids_as_base64(raw: bytes) -> str:
    """OTLP's JSON writes ids in hex, where protobuf's own JSON mapping expects base64.

    https://opentelemetry.io/docs/specs/otlp/#json-protobuf-encoding
    """

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
