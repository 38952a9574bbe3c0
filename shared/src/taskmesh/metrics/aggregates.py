"""What has been counted and timed so far, in the SDK's form when somebody exports it.

A measurement takes the SDK five to nine microseconds, and a small task has some ten of them; here it takes one or two.
What is exported is the same: sums and explicit buckets, cumulative, and for each bucket the last measurement of a trace
that was sampled.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from opentelemetry.sdk.metrics import Exemplar
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Histogram,
    HistogramDataPoint,
    Metric,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext

from taskmesh.metrics.instruments import Instrument, Kind

BUCKETS_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600)

_Attributes = tuple[tuple[str, str], ...]
_CUMULATIVE: Final = AggregationTemporality.CUMULATIVE


@dataclass(slots=True)
class _Times:
    """Lengths of time of one series.

    Attributes:
        counts: By bucket; the last one is what is longer than all bounds.
        examples: By bucket: the value, when it was measured, and its span.
    """

    counts: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS_SECONDS) + 1))
    total: float = 0.0
    shortest: float = float("inf")
    longest: float = 0.0
    examples: dict[int, tuple[float, int, SpanContext]] = field(default_factory=dict)

    def add(self, seconds: float, origin: SpanContext | None) -> None:
        bucket = bisect_left(BUCKETS_SECONDS, seconds)
        self.counts[bucket] += 1
        self.total += seconds
        self.shortest = min(self.shortest, seconds)
        self.longest = max(self.longest, seconds)
        if origin is not None:
            self.examples[bucket] = seconds, time.time_ns(), origin

    def point(self, attributes: Mapping[str, str], begin: int, now: int) -> HistogramDataPoint:
        return HistogramDataPoint(
            attributes,
            begin,
            now,
            count=sum(self.counts),
            sum=self.total,
            bucket_counts=tuple(self.counts),
            explicit_bounds=BUCKETS_SECONDS,
            min=self.shortest,
            max=self.longest,
            exemplars=[Exemplar({}, *each[:2], each[2].span_id, each[2].trace_id) for each in self.examples.values()],
        )


class Aggregates:
    """A sink for counters and histograms.

    Args:
        resource: Who the process is.
        release: Of the mesh.
    """

    def __init__(self, resource: Resource, release: str) -> None:
        self._resource = resource
        self._scope = InstrumentationScope("taskmesh", release)
        self._begin = time.time_ns()
        self._lock = threading.Lock()
        self._sums: dict[Instrument, dict[_Attributes, float]] = {}
        self._times: dict[Instrument, dict[_Attributes, _Times]] = {}

    def measure(
        self, instrument: Instrument, value: float, attributes: Mapping[str, str], origin: SpanContext | None
    ) -> None:
        """Take one measurement; its series stays, as long as the process does."""
        key = tuple(attributes.items())
        with self._lock:
            if instrument.kind is Kind.COUNTER:
                sums = self._sums.setdefault(instrument, {})
                sums[key] = sums.get(key, 0) + value
                return
            series = self._times.setdefault(instrument, {})
            times = series.get(key)
            if times is None:
                times = series[key] = _Times()
            times.add(value, origin)

    def joined(self, collected: MetricsData | None) -> MetricsData:
        """What the SDK has collected, if anything, and what is known here."""
        scopes = [scope for each in collected.resource_metrics for scope in each.scope_metrics] if collected else []
        # OpenTelemetry's encoder keeps one entry for each scope, the last.
        same = [metric for each in scopes if each.scope == self._scope for metric in each.metrics]
        others = [each for each in scopes if each.scope != self._scope]
        ours = ScopeMetrics(self._scope, [*same, *self._metrics()], schema_url="")
        return MetricsData([ResourceMetrics(self._resource, [*others, ours], schema_url="")])

    def _metrics(self) -> Sequence[Metric]:
        now = time.time_ns()
        with self._lock:
            counters = [
                self._metric(
                    counter,
                    Sum(
                        [NumberDataPoint(dict(key), self._begin, now, value) for key, value in sums.items()],
                        _CUMULATIVE,
                        is_monotonic=True,
                    ),
                )
                for counter, sums in self._sums.items()
            ]
            histograms = [
                self._metric(
                    histogram,
                    Histogram([times.point(dict(key), self._begin, now) for key, times in series.items()], _CUMULATIVE),
                )
                for histogram, series in self._times.items()
            ]
        return counters + histograms

    @staticmethod
    def _metric(instrument: Instrument, data: Sum | Histogram) -> Metric:
        return Metric(instrument.name, instrument.description, instrument.unit, data)
