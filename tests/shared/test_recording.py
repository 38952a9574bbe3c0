"""The mesh's own spans against those of OpenTelemetry's SDK, which they stand in for."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, ParentBased, TraceIdRatioBased
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    TraceState,
)

from taskmesh import otlp
from taskmesh.recording import SpanRecorder, promised

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
INTEGER = st.integers(-(2**63), 2**63 - 1)
VALUE = st.one_of(TEXT, st.booleans(), INTEGER, st.floats(allow_nan=False), st.lists(TEXT, max_size=3))
ATTRIBUTES = st.dictionaries(TEXT, VALUE, max_size=6)
NANOSECONDS = st.integers(1, 2**63)
IDS = st.builds(
    SpanContext,
    trace_id=st.integers(1, 2**128 - 1),
    span_id=st.integers(1, 2**64 - 1),
    is_remote=st.booleans(),
    trace_flags=st.just(TraceFlags(TraceFlags.SAMPLED)),
    trace_state=st.sampled_from([TraceState(), TraceState([("vendor", "a"), ("other", "b=c")])]),
)


def recorder(sampler=None):
    """A recorder, and the list of what it has recorded."""
    ended = []
    resource = Resource({"service.name": "shop", "service.instance.id": "host:1"}, "https://example.org/schema")
    scope = InstrumentationScope("test", "1.2", "https://example.org/scope")
    return SpanRecorder(sampler or ParentBased(ALWAYS_ON), resource, scope, ended.append), ended


def within(ids):
    return trace.set_span_in_context(NonRecordingSpan(ids), Context())


def caller(*, sampled=True):
    return SpanContext(0xA, 0xB, is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED if sampled else 0))


@given(st.data())
@settings(deadline=None)
def test_spans_are_encoded_as_opentelemetry_encodes_them(data):
    spans, ended = recorder()
    for _ in range(data.draw(st.integers(1, 3))):
        span = spans.start_span(
            data.draw(TEXT),
            within(data.draw(IDS)) if data.draw(st.booleans()) else Context(),
            data.draw(st.sampled_from(SpanKind)),
            data.draw(ATTRIBUTES),
            [Link(ids, data.draw(ATTRIBUTES)) for ids in data.draw(st.lists(IDS, max_size=3))],
            data.draw(NANOSECONDS),
        )
        for name in data.draw(st.lists(TEXT, max_size=3)):
            span.add_event(name, data.draw(ATTRIBUTES), data.draw(NANOSECONDS))
        span.set_status(Status(StatusCode.ERROR, data.draw(TEXT)) if data.draw(st.booleans()) else StatusCode.OK)
        span.end(data.draw(NANOSECONDS))

    assert ExportTraceServiceRequest.FromString(otlp.encode(ended)) == encode_spans(ended)


def test_values_that_are_equal_and_of_different_types_keep_their_types():
    spans, ended = recorder()
    for value in (1, True, 1.0, "1"):
        spans.start_span("span", attributes={"value": value}).end()

    request = ExportTraceServiceRequest.FromString(otlp.encode(ended))

    told = [span.attributes[0].value.WhichOneof("value") for span in request.resource_spans[0].scope_spans[0].spans]
    assert told == ["int_value", "bool_value", "double_value", "string_value"]


def test_an_attribute_without_a_value_is_left_out():
    spans, ended = recorder()
    spans.start_span("span", attributes={"key": None, "other": 1}).end()

    request = ExportTraceServiceRequest.FromString(otlp.encode(ended))

    [span] = request.resource_spans[0].scope_spans[0].spans
    assert [attribute.key for attribute in span.attributes] == ["other"]


def test_text_that_is_no_utf8_is_told_with_question_marks():
    """Half of a surrogate pair comes out of a JSON document, and would take a batch of spans with it."""
    spans, ended = recorder()
    spans.start_span("a\ud800", attributes={"key": "b\ud800"}).end()

    request = ExportTraceServiceRequest.FromString(otlp.encode(ended))

    [span] = request.resource_spans[0].scope_spans[0].spans
    assert (span.name, span.attributes[0].value.string_value) == ("a?", "b?")


def test_a_span_is_its_parents_child():
    spans, [*_] = recorder()

    span = spans.start_span("span", within(caller()))

    assert span.get_span_context().trace_id == caller().trace_id
    assert span.parent == caller()


@pytest.mark.parametrize("sampled", [True, False])
def test_a_caller_who_has_decided_is_followed(sampled):
    spans, _ = recorder(ParentBased(ALWAYS_OFF if sampled else ALWAYS_ON))

    span = spans.start_span("span", within(caller(sampled=sampled)))

    assert span.is_recording() is sampled
    assert span.get_span_context().trace_flags.sampled is sampled


def test_a_sampler_that_follows_nobody_decides_alone():
    spans, _ = recorder(ALWAYS_OFF)

    assert not spans.start_span("span", within(caller(sampled=True))).is_recording()


def test_a_trace_that_nobody_has_decided_on_is_the_samplers():
    spans, _ = recorder(ParentBased(TraceIdRatioBased(0.25)))

    recorded = sum(spans.start_span("span", Context()).is_recording() for _ in range(4000))

    # Eight standard deviations to each side.
    assert 780 < recorded < 1220


def test_what_is_not_sampled_still_has_ids_of_its_own():
    spans, ended = recorder(ALWAYS_OFF)

    ids = spans.start_span("span", within(caller())).get_span_context()

    assert ids.trace_id == caller().trace_id
    assert ids.is_valid
    assert ids.span_id != caller().span_id
    assert ended == []


def test_the_state_of_a_trace_goes_along():
    spans, _ = recorder()
    state = TraceState([("vendor", "a")])
    parent = SpanContext(0xA, 0xB, is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED), trace_state=state)

    assert spans.start_span("span", within(parent)).get_span_context().trace_state == state


def test_a_promised_span_takes_the_ids_it_was_given():
    spans, [*_] = recorder(ParentBased(ALWAYS_OFF))

    with promised(caller()):
        span = spans.start_span("span", Context())

    assert span.get_span_context() == caller()
    assert (span.is_recording(), span.parent) == (True, None)


def test_an_exception_is_told_by_its_class_and_never_by_its_text():
    spans, ended = recorder()

    with pytest.raises(LookupError), spans.start_as_current_span("span"):
        raise LookupError("secret")

    [span] = ended
    assert span.attributes == {"error.type": "LookupError"}
    assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, None)
    assert span.events == ()


def test_a_span_is_the_current_one_for_as_long_as_its_block():
    spans, _ = recorder()

    with spans.start_as_current_span("span") as span:
        assert trace.get_current_span() is span

    assert trace.get_current_span() is not span


def test_a_span_that_has_ended_stays_as_it_is():
    spans, ended = recorder()
    span = spans.start_span("span")
    span.end(7)

    span.set_attribute("late", 1)
    span.set_attributes({"late": 1})
    span.update_name("late")
    span.add_event("late")
    span.add_link(caller())
    span.set_status(StatusCode.ERROR)
    span.end(8)

    assert ended == [span]
    assert (span.name, span.end_time, span.attributes, span.events, span.links) == ("span", 7, {}, (), ())
    assert span.status.is_unset
