"""Sends spans to the collector, from a thread of its own, so that no work waits for it or fails with it.

    span ends -> queue (bounded: the oldest gives way) -> batch -> OTLP/HTTP -> collector

OpenTelemetry's own batch processor loses a batch that the collector has not taken within ten seconds, tells nobody of
what its full queue drops, and may hold up the end of a process for half a minute. Here a batch that may be taken later
goes back to the queue, what is dropped is counted and said, and the end of a process waits for a few seconds at most.

A request that was not answered may have arrived all the same: spans are sent at least once, always under the same id.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Any

import requests
from opentelemetry import context
from opentelemetry.context import _SUPPRESS_INSTRUMENTATION_KEY
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.environment_variables import (
    OTEL_BSP_MAX_EXPORT_BATCH_SIZE,
    OTEL_BSP_MAX_QUEUE_SIZE,
    OTEL_BSP_SCHEDULE_DELAY,
)
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from requests.adapters import HTTPAdapter

from taskmesh import otlp
from taskmesh.recording import RecordedSpan

logger = logging.getLogger(__name__)

# The end of a process waits so long for its last spans: little beside the twenty seconds that its tasks get.
FLUSH_SECONDS = 5.0
# An outage of the collector concerns every process of the mesh.
REPEAT_SECONDS = 60.0

# As OpenTelemetry's own processor has them. A span takes 3 to 4 kB: a full queue and a batch on its way take 10 MB.
QUEUE_SIZE = 2048
BATCH_SIZE = 512
# A link takes 0.6 kB, and a batch of messages may have 128 of them.
LINKS_AS_A_SPAN = 6
DELAY_MILLISECONDS = 5000

# What a collector answers when the same request may be taken later:
# https://opentelemetry.io/docs/specs/otlp/#failures-1
_PASSING = frozenset(
    {
        HTTPStatus.TOO_MANY_REQUESTS,
        HTTPStatus.BAD_GATEWAY,
        HTTPStatus.SERVICE_UNAVAILABLE,
        HTTPStatus.GATEWAY_TIMEOUT,
    }
)


def processor(on_dropped: Callable[[int], None]) -> SpanSender:
    """Return the processor that sends to `OTEL_EXPORTER_OTLP_ENDPOINT`, sized by OpenTelemetry's `OTEL_BSP_*`.

    Args:
        on_dropped: Is told how many spans were given up, now and then, mostly by the sending thread.
    """
    line = Line()
    queue_size = _positive(OTEL_BSP_MAX_QUEUE_SIZE, QUEUE_SIZE)
    return SpanSender(
        Exporter(session=line),
        line,
        on_dropped,
        queue_size=queue_size,
        batch_size=min(queue_size, _positive(OTEL_BSP_MAX_EXPORT_BATCH_SIZE, BATCH_SIZE)),
        delay_seconds=_positive(OTEL_BSP_SCHEDULE_DELAY, DELAY_MILLISECONDS) / 1000,
    )


class Exporter(OTLPSpanExporter):
    """OpenTelemetry's exporter, which has the mesh's own spans encoded by the mesh."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send spans; raises if one of them cannot be encoded."""
        own = [span for span in spans if isinstance(span, RecordedSpan)]
        body = otlp.encode(own) if own else b""
        if len(own) < len(spans):
            others = [span for span in spans if not isinstance(span, RecordedSpan)]
            # Two requests that are written one behind the other are one request.
            body += encode_spans(others).SerializeToString()
        return SpanExportResult.SUCCESS if self._client.export(body).success else SpanExportResult.FAILURE


class Line(requests.Session):
    """The connection to the collector, which remembers how its last request ended; the exporter tells only that it did.

    Attributes:
        outcome: The status of the answer, or the class of the error; None before the first request.
    """

    outcome: int | str | None = None

    def __init__(self) -> None:
        super().__init__()
        self._raised: list[requests.RequestException] = []

    def request(self, *args: Any, **kwargs: Any) -> requests.Response:
        """Send a request as any session does."""
        try:
            answer = super().request(*args, **kwargs)
        except requests.RequestException as error:
            failure = type(error)
            _clear_frames(error)
        else:
            self.outcome = answer.status_code
            return answer
        self.outcome = failure.__name__
        # A new one, whose frames are but those of its way out of here.
        self._raised.append(failure(self.outcome))
        raise self._raised[-1]

    def forget(self) -> None:
        """Let go of the frames of all errors so far; called when nobody handles one any more."""
        for error in self._raised:
            error.__traceback__ = None
        self._raised.clear()

    def renew(self) -> None:
        """Forget open connections: in a process that was forked off they are the parent's."""
        for prefix in list(self.adapters):
            self.mount(prefix, HTTPAdapter())

    @property
    def is_away(self) -> bool:
        """True if what was sent last may be taken when it is sent again."""
        return isinstance(self.outcome, str) or self.outcome in _PASSING


def _clear_frames(error: BaseException) -> None:
    """Let go of what the frames hold in which an error, and those that led to it, came about."""
    waiting: list[object] = [error]
    seen: set[int] = set()
    while waiting:
        each = waiting.pop()
        if isinstance(each, BaseException) and id(each) not in seen:
            seen.add(id(each))
            traceback.clear_frames(each.__traceback__)
            waiting += [each.__context__, each.__cause__, getattr(each, "reason", None), *each.args]


class SpanSender(SpanProcessor):
    """Queues spans that ended, and sends them in batches.

    Nothing here raises, and nothing but the end of the process and `force_flush` waits. The thread is started by the
    first span, and again in a process that was forked off, which has nothing of its parent's queue.

    Args:
        exporter: Its time-out bounds an attempt to send a batch.
        line: Tells how the exporter's last request ended.
        on_dropped: As above.
        queue_size: Spans that wait at most, `LINKS_AS_A_SPAN` links counted as one; beyond that the oldest are dropped.
        batch_size: Spans in a request at most; so many are sent at once.
        delay_seconds: How long fewer wait, and how long the sender waits after a failure.
    """

    def __init__(
        self,
        exporter: SpanExporter,
        line: Line,
        on_dropped: Callable[[int], None],
        *,
        queue_size: int,
        batch_size: int,
        delay_seconds: float,
    ) -> None:
        self._exporter = exporter
        self._line = line
        self._on_dropped = on_dropped
        self._queue_size = queue_size
        self._batch_size = batch_size
        self._delay_seconds = delay_seconds
        self._begin()
        begin_again = weakref.WeakMethod(self._begin_again)
        os.register_at_fork(after_in_child=lambda: (begin := begin_again()) and begin())

    def _begin_again(self) -> None:
        self._line.renew()
        self._begin()

    def _begin(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._queue: deque[ReadableSpan] = deque()
        self._weight = 0
        self._in_flight: list[ReadableSpan] = []
        self._thread: threading.Thread | None = None
        self._failing = self._flushing = self._ending = False
        self._uncounted = 0
        self._outage = Outage()

    def on_end(self, span: ReadableSpan) -> None:
        """Queue a span that was sampled."""
        if span.context is not None and span.context.trace_flags.sampled:
            self.put(span)

    def put(self, span: ReadableSpan) -> None:
        """Queue a span, whatever the sampler said of it."""
        with self._changed:
            if self._ending:
                self._uncounted += 1
                return
            self._queue.append(span)
            self._weight += _weight(span)
            self._drop_oldest()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="span-sender", daemon=True)
                self._thread.start()
            elif len(self._queue) == self._batch_size:
                self._changed.notify_all()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        """Send what waits; False if the collector has not taken it in time."""
        with self._changed:
            self._flushing = self._thread is not None
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._flushing, timeout_millis / 1000)
            return not self._queue and not self._in_flight

    def shutdown(self) -> None:
        """Send what waits, for `FLUSH_SECONDS` at most, then take no more and give up the rest."""
        with self._changed:
            if self._ending:
                return
            self._ending = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join(FLUSH_SECONDS)
        # It may be waiting to try again, or for an answer: whether that batch arrives, nobody will know.
        self._exporter.shutdown()
        with self._changed:
            lost = len(self._queue) + len(self._in_flight)
            self._uncounted += lost
            self._queue.clear()
        self._count()
        if lost:
            logger.warning(
                "spans lost at the end", extra={"pid": os.getpid(), "dropped": lost, "reason": self._line.outcome}
            )

    def _run(self) -> None:
        # Who instruments all HTTP clients of a process would have each export make a span to export.
        context.attach(context.set_value(_SUPPRESS_INSTRUMENTATION_KEY, True))
        while self._has_more():
            with self._changed:
                self._changed.wait_for(self._is_urgent, self._delay_seconds)
                count = min(len(self._queue), self._batch_size)
                self._in_flight = [self._take() for _ in range(count)]
            self._send()
            dropped, waiting = self._count()
            self._outage.tell(dropped=dropped, waiting=waiting, failing=self._failing, reason=self._line.outcome)

    def _has_more(self) -> bool:
        with self._changed:
            return not self._ending or (bool(self._queue) and not self._failing)

    def _is_urgent(self) -> bool:
        # No number of spans brings back a collector that is away.
        full = len(self._queue) >= self._batch_size and not self._failing
        return self._ending or self._flushing or full

    def _send(self) -> None:
        """Send the batch in flight; it goes back to the queue, before all others, if it may be taken later."""
        self._line.outcome = None
        failed = bool(self._in_flight) and not self._is_taken(self._in_flight)
        with self._changed:
            if failed and self._line.is_away:
                self._queue.extendleft(reversed(self._in_flight))
                self._weight += sum(map(_weight, self._in_flight))
                self._drop_oldest()
            elif failed:
                self._uncounted += len(self._in_flight)
            self._in_flight = []
            self._failing = failed and self._line.is_away
            if self._failing or not self._queue:
                self._flushing = False
            self._changed.notify_all()

    def _is_taken(self, batch: list[ReadableSpan]) -> bool:
        try:
            return self._exporter.export(batch) is SpanExportResult.SUCCESS
        except Exception:  # noqa: BLE001 - an escape would end the thread, and a span that cannot be encoded is lost
            return False
        finally:
            # Errors and frames refer to each other in rings, each with a request's body, half a megabyte, in it. The
            # collector of garbage may not come by for a quarter of an hour.
            self._line.forget()

    def _take(self) -> ReadableSpan:
        span = self._queue.popleft()
        self._weight -= _weight(span)
        return span

    def _drop_oldest(self) -> None:
        while self._weight > self._queue_size and len(self._queue) > 1:
            self._take()
            self._uncounted += 1

    def _count(self) -> tuple[int, int]:
        """Report how many spans were given up since the last time; returns that, and how many wait."""
        with self._changed:
            dropped, self._uncounted = self._uncounted, 0
            waiting = len(self._queue)
        if dropped:
            self._on_dropped(dropped)
        return dropped, waiting


def _weight(span: ReadableSpan) -> int:
    return 1 + len(span.links) // LINKS_AS_A_SPAN


class Outage:
    """Says that spans are not exported, at most once a minute, and after each time once that they are again."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._said_at: float | None = None
        self._dropped = 0
        self._open = False

    def tell(self, *, dropped: int, waiting: int, failing: bool, reason: int | str | None) -> None:
        """Take note of how sending goes, and say so if it is time.

        Args:
            dropped: Spans given up since the call before.
            waiting: Spans that are kept for another try.
            failing: True if the collector has just not taken a batch.
            reason: How the last request ended.
        """
        self._dropped += dropped
        now = self._clock()
        if failing or dropped or (self._dropped and not self._open):
            if self._said_at is None or now - self._said_at >= REPEAT_SECONDS:
                facts = {"pid": os.getpid(), "dropped": self._dropped, "waiting": waiting, "reason": reason}
                logger.warning("spans not exported", extra=facts)
                self._said_at, self._dropped, self._open = now, 0, True
        elif self._open:
            logger.info("spans exported again", extra={"pid": os.getpid(), "dropped": self._dropped})
            self._dropped, self._open = 0, False


def _positive(variable: str, default: int) -> int:
    """A number of the environment; the default where it is none, as OpenTelemetry has it."""
    try:
        return max(1, int(os.environ.get(variable, default)))
    except ValueError:
        return default
