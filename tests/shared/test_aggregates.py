"""What the aggregates export, against what OpenTelemetry's SDK exports of the same measurements."""

from __future__ import annotations

import threading

from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

from taskmesh.metrics.aggregates import BUCKETS_SECONDS, Aggregates
from taskmesh.metrics.instruments import Attribute, Counter, Histogram

COUNTED = Counter("aggregates.counted", "{thing}", "Things.", Attribute("way", values=["well", "badly"]))
TIMED = Histogram("aggregates.timed", "s", "Times.", Attribute("way", values=["well", "badly"]))
RESOURCE = Resource({"service.name": "shop"})
WAYS = st.sampled_from([{}, {"way": "well"}, {"way": "badly"}])
SECONDS = st.one_of(st.sampled_from(BUCKETS_SECONDS), st.floats(0, 10_000, allow_subnormal=False))


def ids(number):
    return SpanContext(number, number, is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED))


def points(data):
    """The data points by metric and attributes."""
    return {
        (metric.name, metric.unit, metric.description, tuple(point.attributes.items())): (metric.data, point)
        for each in data.resource_metrics
        for scope in each.scope_metrics
        for metric in scope.metrics
        for point in metric.data.data_points
    }


@given(st.lists(st.tuples(WAYS, SECONDS), min_size=1, max_size=40))
def test_times_are_exported_as_the_sdk_exports_them(measured):
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader], RESOURCE, shutdown_on_exit=False)
    theirs = provider.get_meter("test").create_histogram(
        TIMED.name, TIMED.unit, TIMED.description, explicit_bucket_boundaries_advisory=BUCKETS_SECONDS
    )
    ours = Aggregates(RESOURCE, "1")
    for number, (attributes, seconds) in enumerate(measured, start=1):
        ours.measure(TIMED, seconds, attributes, ids(number))
        theirs.record(seconds, attributes, set_span_in_context(NonRecordingSpan(ids(number)), Context()))

    expected, told = points(reader.get_metrics_data()), points(ours.joined(None))

    assert told.keys() == expected.keys()
    for key, (data, point) in told.items():
        same, sdk = expected[key]
        assert data.aggregation_temporality == same.aggregation_temporality
        for name in ("count", "sum", "bucket_counts", "explicit_bounds", "min", "max"):
            assert getattr(point, name) == getattr(sdk, name), name
        shown = {(each.value, each.trace_id, each.span_id) for each in point.exemplars}
        assert shown <= {(seconds, number, number) for number, (_, seconds) in enumerate(measured, start=1)}
        assert len(shown) == sum(count > 0 for count in point.bucket_counts)


@given(st.lists(st.tuples(WAYS, st.integers(0, 1000)), min_size=1, max_size=40))
def test_sums_are_exported_as_the_sdk_exports_them(measured):
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader], RESOURCE, shutdown_on_exit=False)
    theirs = provider.get_meter("test").create_counter(COUNTED.name, COUNTED.unit, COUNTED.description)
    ours = Aggregates(RESOURCE, "1")
    for attributes, amount in measured:
        ours.measure(COUNTED, amount, attributes, None)
        theirs.add(amount, attributes)

    expected, told = points(reader.get_metrics_data()), points(ours.joined(None))

    assert {key: point.value for key, (_, point) in told.items()} == {
        key: point.value for key, (_, point) in expected.items()
    }
    assert {(data.is_monotonic, data.aggregation_temporality) for data, _ in told.values()} == {
        (data.is_monotonic, data.aggregation_temporality) for data, _ in expected.values()
    }


def test_a_time_without_a_trace_is_no_example():
    aggregates = Aggregates(RESOURCE, "1")
    aggregates.measure(TIMED, 1.0, {}, None)

    [(_, point)] = points(aggregates.joined(None)).values()

    assert (point.count, point.exemplars) == (1, [])


def test_measurements_of_many_threads_are_all_counted():
    aggregates = Aggregates(RESOURCE, "1")

    def count():
        for _ in range(5000):
            aggregates.measure(COUNTED, 1, {"way": "well"}, None)

    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    [(_, point)] = points(aggregates.joined(None)).values()
    assert point.value == 40_000


def test_what_the_sdk_has_collected_stays_beside_it():
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader], RESOURCE, shutdown_on_exit=False)
    provider.get_meter("another library").create_counter("theirs").add(1)
    aggregates = Aggregates(RESOURCE, "1")
    aggregates.measure(COUNTED, 1, {}, None)

    joined = aggregates.joined(reader.get_metrics_data())

    assert {name for name, *_ in points(joined)} == {"theirs", "aggregates.counted"}


def test_what_the_sdk_has_collected_under_our_own_name_is_encoded_with_the_rest():
    """The encoder dropped the gauges: it keeps the last of two entries of one scope."""
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader], RESOURCE, shutdown_on_exit=False)
    provider.get_meter("taskmesh", "1").create_gauge("gauge").set(1)
    aggregates = Aggregates(RESOURCE, "1")
    aggregates.measure(COUNTED, 1, {}, None)

    request = encode_metrics(aggregates.joined(reader.get_metrics_data()))

    [of_process] = request.resource_metrics
    assert {metric.name for scope in of_process.scope_metrics for metric in scope.metrics} == {
        "gauge",
        "aggregates.counted",
    }
