"""The mesh's spans as OTLP: the bytes of an ExportTraceServiceRequest.

OpenTelemetry's own encoder makes an object of each attribute of each span, which takes longer than all else that a span
takes. Most attributes are the same for thousands of spans, so here their bytes are kept. Fields and their numbers are
those of https://github.com/open-telemetry/opentelemetry-proto/blob/v1.7.0/opentelemetry/proto/trace/v1/trace.proto; a
test holds what is written here against what that encoder writes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue, KeyValue
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode

_KINDS: Final = {
    SpanKind.INTERNAL: 1,
    SpanKind.SERVER: 2,
    SpanKind.CLIENT: 3,
    SpanKind.PRODUCER: 4,
    SpanKind.CONSUMER: 5,
}
# Whether a parent or a link is of another process; the first says that the second is known.
_IS_REMOTE_IS_KNOWN, _IS_REMOTE = 0x100, 0x200

# How a field is written: https://protobuf.dev/programming-guides/encoding/#structure
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5

_fixed64 = struct.Struct("<Q").pack
_fixed32 = struct.Struct("<I").pack


def encode(spans: Sequence[ReadableSpan]) -> bytes:
    """The body of a request with these spans; they are of one process, and of one instrumentation scope."""
    resource, scope = _frame(spans[0].resource, spans[0].instrumentation_scope)
    # A message that is cut in two is the sum of both.
    scope_spans = scope + b"".join([_field(2, b"".join(_fields(span))) for span in spans])
    return _field(1, resource + _field(2, scope_spans))


@lru_cache(maxsize=8)
def _frame(resource: Resource, scope: InstrumentationScope | None) -> tuple[bytes, bytes]:
    """The ResourceSpans and the ScopeSpans that spans are in, without any; written by who knows them."""
    ids = SpanContext(1, 1, is_remote=False)
    nothing = ReadableSpan("", ids, resource=resource, instrumentation_scope=scope)
    [resource_spans] = encode_spans([nothing]).resource_spans
    [scope_spans] = resource_spans.scope_spans
    del scope_spans.spans[:]
    written = scope_spans.SerializeToString()
    del resource_spans.scope_spans[:]
    return resource_spans.SerializeToString(), written


def _fields(span: ReadableSpan) -> Iterator[bytes]:
    ids = span.get_span_context()
    assert ids is not None
    yield _ids(ids)
    if span.parent is not None:
        yield _field(4, span.parent.span_id.to_bytes(8))
    yield _text(5, span.name)
    yield _KIND[span.kind]
    yield _TAG_START + _fixed64(span.start_time or 0)
    yield _TAG_END + _fixed64(span.end_time or 0)
    yield from _attributes(9, span.attributes or {})
    for event in span.events:
        yield _field(11, b"".join(_event(event)))
    for link in span.links:
        yield _field(13, b"".join(_link(link)))
    yield _field(15, b"" if span.status.is_unset else _status(span.status))
    yield _TAG_FLAGS + _flags(span.parent)


def _ids(ids: SpanContext) -> bytes:
    written = _field(1, ids.trace_id.to_bytes(16)) + _field(2, ids.span_id.to_bytes(8))
    if ids.trace_state:
        written += _text(3, ",".join(f"{key}={value}" for key, value in ids.trace_state.items()))
    return written


def _event(event: Event) -> Iterator[bytes]:
    yield _tag(1, _FIXED64) + _fixed64(event.timestamp)
    yield _text(2, event.name)
    yield from _attributes(3, event.attributes or {})


def _link(link: Link) -> Iterator[bytes]:
    yield _field(1, link.context.trace_id.to_bytes(16)) + _field(2, link.context.span_id.to_bytes(8))
    yield from _attributes(4, link.attributes or {})
    yield _tag(6, _FIXED32) + _flags(link.context)


def _status(status: Status) -> bytes:
    description = _text(2, status.description) if status.description else b""
    return description + _tag(3, _VARINT) + _varint(2 if status.status_code is StatusCode.ERROR else 1)


def _flags(context: SpanContext | None) -> bytes:
    return _REMOTE if context is not None and context.is_remote else _LOCAL


def _attributes(number: int, attributes: Mapping[str, Any]) -> Iterable[bytes]:
    for key, value in attributes.items():
        if value is None:
            continue
        try:
            yield _attribute(number, key, value)
        except TypeError:
            # A list cannot be kept by its value; any other mistake is raised again.
            yield _attribute.__wrapped__(number, key, value)


# 1 and True and 1.0 are equal, and written differently.
@lru_cache(maxsize=4096, typed=True)
def _attribute(number: int, key: str, value: Any) -> bytes:
    return _field(number, KeyValue(key=key, value=_value(value)).SerializeToString())


def _value(value: Any) -> AnyValue:
    if isinstance(value, bool):
        return AnyValue(bool_value=value)
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return AnyValue(int_value=value)
    if isinstance(value, float):
        return AnyValue(double_value=value)
    if isinstance(value, (list, tuple)):
        return AnyValue(array_value=ArrayValue(values=[_value(each) for each in value]))
    return AnyValue(string_value=_encodable(str(value)))


def _text(number: int, text: str) -> bytes:
    return _field(number, _encodable(text).encode())


def _encodable(text: str) -> str:
    """The text without lone surrogates, which Python knows and UTF-8 does not."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _field(number: int, content: bytes) -> bytes:
    return _tag(number, _LENGTH) + _varint(len(content)) + content


@lru_cache
def _tag(number: int, wire_type: int) -> bytes:
    return _varint(number << 3 | wire_type)


def _varint(number: int) -> bytes:
    if number < 0x80:
        return bytes((number,))
    written = bytearray()
    while number >= 0x80:
        written.append(number & 0x7F | 0x80)
        number >>= 7
    written.append(number)
    return bytes(written)


_KIND: Final = {kind: _tag(6, _VARINT) + _varint(number) for kind, number in _KINDS.items()}
_TAG_START, _TAG_END, _TAG_FLAGS = _tag(7, _FIXED64), _tag(8, _FIXED64), _tag(16, _FIXED32)
_LOCAL, _REMOTE = _fixed32(_IS_REMOTE_IS_KNOWN), _fixed32(_IS_REMOTE_IS_KNOWN | _IS_REMOTE)
