"""The process's meter provider: OTLP where an endpoint is set, a page for Prometheus where a port is set, or neither.

Nothing here may harm the work: a page that cannot be opened is logged, and a collector that is away is the exporter's
matter, on its own thread.
"""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Iterable
from typing import Any, Final

from opentelemetry import metrics
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.metrics import CallbackOptions, Meter, Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import (
    MetricExportResult,
    MetricReader,
    MetricsData,
    PeriodicExportingMetricReader,
)
from opentelemetry.sdk.metrics.view import DropAggregation, View
from opentelemetry.sdk.resources import Resource
from prometheus_client import CollectorRegistry, start_http_server

from taskmesh.metrics import catalogue, instruments
from taskmesh.metrics.aggregates import Aggregates
from taskmesh.metrics.instruments import Gauge
from taskmesh.settings import ServiceSettings

logger = logging.getLogger(__name__)

ENDPOINT_VARIABLE: Final = "OTEL_EXPORTER_OTLP_ENDPOINT"

STOP_SECONDS: Final = 3
"""How long a process that ends waits for its last export."""

_VIEWS: Final = (
    # What the SDK measures of itself is not in the catalogue.
    View(instrument_name="otel.sdk.*", aggregation=DropAggregation()),
)


class _Reader(PeriodicExportingMetricReader):
    """Exports from the process that made it, and from no other."""

    def _at_fork_reinit(self) -> None:
        """A pool child exports nothing: it would tell its parent's figures a second time."""


class _Exporter(OTLPMetricExporter):
    """Exports the aggregates with what the SDK has collected."""

    def __init__(self, aggregates: Aggregates) -> None:
        super().__init__()
        self._aggregates = aggregates

    def export(self, metrics_data: MetricsData, *args: Any, **kwargs: Any) -> MetricExportResult:
        return super().export(self._aggregates.joined(metrics_data), *args, **kwargs)


class _PageReader(PrometheusMetricReader):
    """Shows the aggregates with what the SDK has collected."""

    def __init__(self, aggregates: Aggregates, registry: CollectorRegistry) -> None:
        # Labels that name the library which measured would be in every series, and the same.
        super().__init__(registry=registry, scope_info_enabled=False)
        self._aggregates = aggregates

    def _receive_metrics(self, metrics_data: MetricsData, *args: Any, **kwargs: Any) -> None:
        super()._receive_metrics(self._aggregates.joined(metrics_data), *args, **kwargs)


class _Page:
    """What Prometheus scrapes."""

    def __init__(self, host: str, port: int, aggregates: Aggregates) -> None:
        """Open the page.

        Raises:
            OSError: The port is taken, or there is no such address.
        """
        registry = CollectorRegistry()
        self.reader = _PageReader(aggregates, registry)
        self._server, self._thread = start_http_server(port, host, registry)
        logger.info("metrics page opened", extra={"host": host, "port": self._server.server_port})

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(STOP_SECONDS)

    def forget(self) -> None:
        """Leave the port to the process that opened it; called in a fork of it."""
        self._server.socket.close()


def _show(meter: Meter, gauge: Gauge) -> None:
    """Export what the gauge shows."""

    def look(_: CallbackOptions) -> Iterable[Observation]:
        return [Observation(value, attributes) for value, attributes in gauge.read()]

    meter.create_observable_gauge(gauge.name, [look], gauge.unit, gauge.description)


_provider: MeterProvider | None = None
_page: _Page | None = None


def start(resource: Resource, release: str, settings: ServiceSettings) -> None:
    """Begin to export metrics as environment and settings say; without either nothing is recorded.

    Args:
        resource: Who the process is.
        release: The version of the mesh.
    """
    global _provider, _page  # noqa: PLW0603 - OpenTelemetry's own provider is a process-wide global too
    readers: list[MetricReader] = []
    aggregates = Aggregates(resource, release)
    if settings.metrics_port is not None:
        try:
            _page = _Page(settings.metrics_host, settings.metrics_port, aggregates)
        except OSError as error:
            facts = {"host": settings.metrics_host, "port": settings.metrics_port, "reason": error.strerror}
            logger.error("metrics page not opened", extra=facts)  # noqa: TRY400 - the reason says all
        else:
            readers.append(_page.reader)
    if os.environ.get(ENDPOINT_VARIABLE):
        # Behind the page, which must not wait at the end for a collector that is away.
        readers.append(_Reader(_Exporter(aggregates)))
    if not readers:
        return
    _provider = MeterProvider(readers, resource=resource, views=_VIEWS, shutdown_on_exit=False)
    metrics.set_meter_provider(_provider)
    meter = _provider.get_meter("taskmesh", release)
    for instrument in instruments.declared():
        if isinstance(instrument, Gauge):
            _show(meter, instrument)
    instruments.send_to(aggregates)
    catalogue.BUILD_INFO.show([(1, {"version": release, "python_version": platform.python_version()})])
    # Nothing is lost yet: a counter that begins with its first loss has no increase to be seen.
    for signal in ("traces", "metrics"):
        catalogue.TELEMETRY_DROPPED.add(0, signal=signal)


def stop() -> None:
    """Export what is recorded, and close the page."""
    global _provider, _page  # noqa: PLW0603 - see `start`
    instruments.send_to(None)
    if _page is not None:
        _page.close()
    if _provider is not None:
        try:
            _provider.shutdown(timeout_millis=STOP_SECONDS * 1000)
        except Exception as error:  # noqa: BLE001 - OpenTelemetry raises a bare Exception for a collector that is away
            logger.warning("last metrics not exported", extra={"exception": type(error).__qualname__})
    _provider = _page = None


def leave() -> None:
    """Forget, in a fork of it, the process that exports; without a sink of its own this one records nothing."""
    global _provider, _page  # noqa: PLW0603 - see `start`
    instruments.send_to(None)
    if _page is not None:
        _page.forget()
    _provider = _page = None
