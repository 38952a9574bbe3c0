"""A real OTLP/HTTP receiver for tests."""

from __future__ import annotations

import contextlib
import gzip
import socket
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

from taskmesh.parts.points import Point, read_points
from taskmesh.parts.spans import Span, read_spans

__all__ = ["OtlpSink", "Point", "Span"]

Series = tuple[str, tuple[tuple[str, Any], ...], tuple[tuple[str, Any], ...]]


class OtlpSink:
    """Receives spans and metrics on a free port of 127.0.0.1 until it is left; logs are taken and dropped.

    Attributes:
        spans: In the order of their arrival.
        points: The newest data point of every series of every process; one that is no longer sent stays.
        exemplars: The traces that were given as examples, by metric.
        status: What spans are answered with. With anything but 200 they are not kept.
        gate: Clear it, and every request waits, its body read, until it is set again.
        requests: How many have come in, whatever became of them.
        bodies: What came, unpacked, by path: in protobuf each text stands as it is.

    Args:
        port: 0 takes a free one; a number takes the place of another sink that was left.
    """

    def __init__(self, port: int = 0) -> None:
        self._arrived = threading.Condition()
        self._server = _Server(("127.0.0.1", port), _handler(self, self._keep, self._keep_points))
        self._thread = threading.Thread(target=self._server.serve_forever, name="otlp-sink", daemon=True)
        self.spans: list[Span] = []
        self.points: dict[Series, Point] = {}
        self.exemplars: dict[str, set[str]] = {}
        self.status = 200
        self.gate = threading.Event()
        self.gate.set()
        self.requests = 0
        self.bodies: dict[str, list[bytes]] = {}

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def endpoint(self) -> str:
        """In the form of OTEL_EXPORTER_OTLP_ENDPOINT: exporters add `/v1/traces` to it."""
        return f"http://127.0.0.1:{self.port}"

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

    @property
    def gauges(self) -> dict[str, float]:
        """The last value of each gauge without attributes, by name."""
        with self._arrived:
            return {point.name: point.value for point in self.points.values() if _is_plain_gauge(point)}

    def measured(self, name: str, **attributes: str) -> list[Point]:
        """The newest data points of a metric with these attributes, whatever others they have.

        Args:
            attributes: By name, with underscores in place of dots.
        """
        with self._arrived:
            return [
                point
                for point in self.points.values()
                if point.name == name
                and attributes.items()
                <= {key.replace(".", "_"): value for key, value in point.attributes.items()}.items()
            ]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End before the block does: connections are refused from now on."""
        self.gate.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)

    def _keep(self, spans: list[Span]) -> None:
        with self._arrived:
            self.spans.extend(spans)
            self._arrived.notify_all()

    def _keep_points(self, points: list[Point]) -> None:
        with self._arrived:
            for point in points:
                series = point.name, _sorted(point.resource), _sorted(point.attributes)
                self.points[series] = point
                self.exemplars.setdefault(point.name, set()).update(point.exemplars)
            self._arrived.notify_all()


def _sorted(attributes: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted((name, str(value)) for name, value in attributes.items()))


def _is_plain_gauge(point: Point) -> bool:
    return point.kind == "gauge" and not point.attributes


class _Server(ThreadingHTTPServer):
    """Cuts, when it is closed, also the connections that exporters keep open, as the end of a real collector does."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._connections: list[socket.socket] = []

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self._connections.append(connection)
        return connection, address

    def server_close(self) -> None:
        super().server_close()
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Bear that an exporter that was stopped does not wait for its answer."""


def _handler(
    sink: OtlpSink, keep: Callable[[list[Span]], None], keep_points: Callable[[list[Point]], None]
) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            content_type = self.headers.get("Content-Type", "application/x-protobuf")
            sink.requests += 1
            content_encoding = self.headers.get("Content-Encoding", "")
            sink.bodies.setdefault(self.path, []).append(gzip.decompress(body) if content_encoding == "gzip" else body)
            sink.gate.wait()
            status = sink.status if self.path == "/v1/traces" else 200
            try:
                if self.path == "/v1/traces" and status == 200:
                    keep(read_spans(body, content_type=content_type, content_encoding=content_encoding))
                if self.path == "/v1/metrics":
                    keep_points(read_points(body, content_encoding=content_encoding))
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
