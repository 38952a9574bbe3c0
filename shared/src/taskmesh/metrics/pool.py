"""From a worker's pool children to its main process, which records what they measure.

A socket that the children inherit carries one measurement in a packet. What a child has sent outlives it, whatever
kills it; series do not multiply with processes; and the one page of the worker shows everything. A child never waits:
what finds no room is dropped, and counted.

The socket keeps packets apart and in order (SOCK_SEQPACKET) and not, as SOCK_DGRAM does, ten of them at most: that is
`net.unix.max_dgram_qlen` in a fresh network namespace, such as a container's.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Mapping
from typing import Final

from opentelemetry.trace import SpanContext, TraceFlags

from taskmesh.metrics import catalogue, instruments
from taskmesh.metrics.instruments import Instrument, Sink

PACKET_MAX_BYTES: Final = 16 * 1024
"""A measurement has some hundred bytes."""

STOP_SECONDS: Final = 5.0

_END: Final = b"end"


class Channel:
    """The socket. Made by the main process before it forks; `receive` there, `send_from_child` in each child."""

    def __init__(self) -> None:
        self._receiver, self._sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._thread: threading.Thread | None = None

    def receive(self, sink: Sink) -> None:
        """Have everything that children send taken by the sink, on a thread of its own, until `stop`."""
        self._thread = threading.Thread(target=self._take, args=(sink,), name="taskmesh-metrics", daemon=True)
        self._thread.start()

    def send_from_child(self) -> None:
        """Have this process, a fork, send what it measures."""
        self._receiver.close()
        self._sender.setblocking(False)
        instruments.send_to(_ToParent(self._sender))

    def stop(self) -> None:
        """Take what is left of children that are gone, and end; in the main process."""
        if self._thread is not None:
            # Behind everything that was sent.
            self._sender.settimeout(STOP_SECONDS)
            with contextlib.suppress(OSError):
                self._sender.send(_END)
            self._thread.join(STOP_SECONDS)
        self._sender.close()
        self._receiver.close()

    def _take(self, sink: Sink) -> None:
        while (packet := self._receiver.recv(PACKET_MAX_BYTES)) != _END:
            name, value, attributes, ids, dropped = json.loads(packet)
            origin = None
            if ids is not None:
                origin = SpanContext(ids[0], ids[1], is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED))
            instrument = instruments.find(name)
            if instrument is not None:
                sink.measure(instrument, value, attributes, origin)
            if dropped:
                sink.measure(catalogue.TELEMETRY_DROPPED, dropped, {"signal": "metrics"}, None)


class _ToParent:
    """Sends measurements, or drops them."""

    def __init__(self, sender: socket.socket) -> None:
        self._sender = sender
        self._dropped = 0

    def measure(
        self, instrument: Instrument, value: float, attributes: Mapping[str, str], origin: SpanContext | None
    ) -> None:
        """Send one measurement, and how many were dropped before it."""
        ids = (origin.trace_id, origin.span_id) if origin is not None else None
        packet = json.dumps((instrument.name, value, attributes, ids, self._dropped)).encode()
        try:
            self._sender.send(packet)
        except OSError:
            # No room, or nobody there any more.
            self._dropped += 1
        else:
            self._dropped = 0
