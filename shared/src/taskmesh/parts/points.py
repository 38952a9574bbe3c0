"""Measurements as they come over OTLP, in a form that a test can read."""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.metrics.v1.metrics_pb2 import Exemplar, HistogramDataPoint, Metric, NumberDataPoint

from taskmesh.parts.spans import attributes_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One data point of one metric: a series, at one moment.

    Attributes:
        kind: `counter`, `gauge` or `histogram`.
        value: Of a histogram, the sum of its measurements.
        count: Of a histogram, how many there are.
        bounds, buckets: Of a histogram.
        exemplars: The trace ids of its examples, in hex.
    """

    name: str
    kind: str
    unit: str
    attributes: Mapping[str, Any]
    resource: Mapping[str, Any]
    value: float
    count: int = 0
    bounds: tuple[float, ...] = ()
    buckets: tuple[int, ...] = ()
    exemplars: tuple[str, ...] = field(default=())


def read_points(body: bytes, *, content_encoding: str = "") -> list[Point]:
    """The data points of an OTLP export request in protobuf, gzipped or not.

    Raises:
        ValueError: The body is not what its headers say.
    """
    try:
        raw = gzip.decompress(body) if content_encoding == "gzip" else body
        request = ExportMetricsServiceRequest.FromString(raw)
    except Exception as error:
        # gzip and protobuf each raise their own; both mean the same to the sender.
        raise ValueError(f"not an OTLP metrics export: {error}") from error
    return [
        point
        for group in request.resource_metrics
        for resource in [attributes_of(group.resource.attributes)]
        for scope in group.scope_metrics
        for metric in scope.metrics
        for point in _points(metric, resource)
    ]


def _points(metric: Metric, resource: Mapping[str, Any]) -> Iterator[Point]:
    match metric.WhichOneof("data"):
        case "sum":
            yield from (_number(metric, "counter", point, resource) for point in metric.sum.data_points)
        case "gauge":
            yield from (_number(metric, "gauge", point, resource) for point in metric.gauge.data_points)
        case "histogram":
            yield from (_histogram(metric, point, resource) for point in metric.histogram.data_points)


def _number(metric: Metric, kind: str, point: NumberDataPoint, resource: Mapping[str, Any]) -> Point:
    return Point(
        name=metric.name,
        kind=kind,
        unit=metric.unit,
        attributes=attributes_of(point.attributes),
        resource=resource,
        value=point.as_int if point.WhichOneof("value") == "as_int" else point.as_double,
        exemplars=_traces(point.exemplars),
    )


def _histogram(metric: Metric, point: HistogramDataPoint, resource: Mapping[str, Any]) -> Point:
    return Point(
        name=metric.name,
        kind="histogram",
        unit=metric.unit,
        attributes=attributes_of(point.attributes),
        resource=resource,
        value=point.sum,
        count=point.count,
        bounds=tuple(point.explicit_bounds),
        buckets=tuple(point.bucket_counts),
        exemplars=_traces(point.exemplars),
    )


def _traces(exemplars: Iterable[Exemplar]) -> tuple[str, ...]:
    return tuple(exemplar.trace_id.hex() for exemplar in exemplars if exemplar.trace_id)
