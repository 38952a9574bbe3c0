"""The mesh's own spans: what OpenTelemetry's SDK makes, in a third of the time.

A task has some ten spans, and a small task takes less time than they would. What the SDK's are dear for is not needed
here: limits on attributes that others set, locks for spans that several threads change, and any number of processors.
Samplers, resources and what is exported stay OpenTelemetry's, and so does the provider that other libraries find.

A span may be changed by one thread at a time. It takes no exceptions: their texts may quote a payload.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from random import getrandbits
from typing import Any, Final

from opentelemetry import context as contexts
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.sampling import Decision, ParentBased, Sampler
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    Tracer,
    TraceState,
)
from opentelemetry.util._decorator import _agnosticcontextmanager

Attributes = Mapping[str, Any]

_SAMPLED: Final = TraceFlags(TraceFlags.SAMPLED)
_NOT_SAMPLED: Final = TraceFlags(TraceFlags.DEFAULT)
_UNSET: Final = Status(StatusCode.UNSET)
_NO_STATE: Final = TraceState()

_promised: ContextVar[SpanContext | None] = ContextVar("taskmesh_promised_span", default=None)


@contextmanager
def promised(ids: SpanContext) -> Iterator[None]:
    """Give these ids, and whether they are sampled, to the one span that is begun in the block, in an empty context.

    `taskmesh.traces` draws the ids of a trace when work is asked for a later time; the span that takes them begins when
    the work does.
    """
    token = _promised.set(ids)
    try:
        yield
    finally:
        _promised.reset(token)


class RecordedSpan(Span, ReadableSpan):
    """A span that is exported when it ends."""

    def __init__(  # noqa: PLR0917 - keywords are slower, and there is one caller
        self,
        recorder: SpanRecorder,
        name: str,
        context: SpanContext,
        parent: SpanContext | None,
        kind: SpanKind,
        attributes: Attributes | None,
        links: Sequence[Link] | None,
        start_time: int | None,
    ) -> None:
        # Not the base's, which does the same from twice as many arguments.
        self._recorder = recorder
        self._name = name
        self._context: SpanContext = context
        self._parent = parent
        self._kind = kind
        self._attributes: dict[str, Any] = dict(attributes) if attributes else {}
        self._events: list[Event] = []
        self._links: list[Link] = list(links) if links else []
        self._status = _UNSET
        self._start_time = start_time or time.time_ns()
        self._end_time: int | None = None
        self._resource = recorder.resource
        self._instrumentation_scope = recorder.scope

    def get_span_context(self) -> SpanContext:
        return self._context

    def is_recording(self) -> bool:
        return self._end_time is None

    def set_attribute(self, key: str, value: Any) -> None:
        if self._end_time is None:
            self._attributes[key] = value

    def set_attributes(self, attributes: Attributes) -> None:
        if self._end_time is None:
            self._attributes.update(attributes)

    def add_event(self, name: str, attributes: Attributes | None = None, timestamp: int | None = None) -> None:
        if self._end_time is None:
            self._events.append(Event(name, attributes, timestamp))

    def add_link(self, context: SpanContext, attributes: Attributes | None = None) -> None:
        if self._end_time is None:
            self._links.append(Link(context, attributes))

    def update_name(self, name: str) -> None:
        if self._end_time is None:
            self._name = name

    def set_status(self, status: Status | StatusCode, description: str | None = None) -> None:
        if self._end_time is None:
            self._status = status if isinstance(status, Status) else Status(status, description)

    def record_exception(self, exception: BaseException, *_: Any, **__: Any) -> None:
        """Keep the exception's class."""
        self.set_attribute("error.type", type(exception).__qualname__)

    def end(self, end_time: int | None = None) -> None:
        if self._end_time is None:
            self._end_time = end_time or time.time_ns()
            self._recorder.on_end(self)


class SpanRecorder(Tracer):
    """Makes spans, and hands those that have ended on.

    Args:
        sampler: Decides on spans whose parent has not been decided on.
        resource: Who the process is.
        scope: What its spans are made by.
        on_end: Takes a span that has ended; must neither raise nor wait.
    """

    def __init__(
        self,
        sampler: Sampler,
        resource: Resource,
        scope: InstrumentationScope,
        on_end: Callable[[ReadableSpan], None],
    ) -> None:
        self._sampler = sampler
        self._follows_parents = isinstance(sampler, ParentBased)
        self.resource = resource
        self.scope = scope
        self.on_end = on_end

    def start_span(  # noqa: PLR0917 - OpenTelemetry's signature
        self,
        name: str,
        context: Context | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Attributes | None = None,
        links: Sequence[Link] | None = None,
        start_time: int | None = None,
        *_: Any,
        **__: Any,
    ) -> Span:
        """Begin a span; one that is not sampled records nothing, and has ids all the same."""
        parent = trace.get_current_span(context).get_span_context()
        given = _promised.get()
        if given is not None:
            ids, is_sampled = given, given.trace_flags.sampled
        else:
            has_parent = parent.is_valid
            trace_id = parent.trace_id if has_parent else _random(128)
            if has_parent and self._follows_parents:
                is_sampled, state = parent.trace_flags.sampled, parent.trace_state
            else:
                result = self._sampler.should_sample(context, trace_id, name, kind, attributes, links)
                is_sampled, state = result.decision is Decision.RECORD_AND_SAMPLE, result.trace_state or _NO_STATE
            flags = _SAMPLED if is_sampled else _NOT_SAMPLED
            ids = SpanContext(trace_id, _random(64), is_remote=False, trace_flags=flags, trace_state=state)
        if not is_sampled:
            return NonRecordingSpan(ids)
        return RecordedSpan(self, name, ids, parent if parent.is_valid else None, kind, attributes, links, start_time)

    @_agnosticcontextmanager
    def start_as_current_span(  # noqa: PLR0917 - OpenTelemetry's signature
        self,
        name: str,
        context: Context | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Attributes | None = None,
        links: Sequence[Link] | None = None,
        start_time: int | None = None,
        record_exception: bool = True,  # noqa: FBT001, FBT002
        set_status_on_exception: bool = True,  # noqa: FBT001, FBT002
        end_on_exit: bool = True,  # noqa: FBT001, FBT002
    ) -> Iterator[Span]:
        """Begin a span that is the current one in the block; an exception that leaves it is told by its class."""
        span = self.start_span(name, context, kind, attributes, links, start_time)
        token = contexts.attach(trace.set_span_in_context(span))
        try:
            yield span
        except Exception as error:
            if record_exception:
                span.record_exception(error)
            if set_status_on_exception:
                span.set_status(StatusCode.ERROR)
            raise
        finally:
            contexts.detach(token)
            if end_on_exit:
                span.end()


def _random(bits: int) -> int:
    while not (number := getrandbits(bits)):
        pass
    return number
