"""Which trace a message belongs to, and how traces are linked.

A message names the span that it was created under in `traceparent`. What is asked for at once goes on in the trace of
whoever asked. What is asked for a later time, tried again by a person or replayed begins a trace of its own, linked
both ways: nobody wants to read a trace that is a week wide, and no tail sampler would wait for its end.

That trace has its ids before it has a span. Whoever asks draws them and writes them into the message; the relay's
`publish` span, made when the message leaves, takes them and so becomes the root. So the asker can link to a span that
will exist only next Tuesday, and the worker continues what it is given without knowing any of this.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, Final

from opentelemetry import trace
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace import Link, SpanContext, TraceFlags

from taskmesh import baggage, logs, telemetry
from taskmesh.celery_protocol import TRACE_LINKS_HEADER

LONGEST_WAIT_IN_TRACE: Final = timedelta(minutes=10)
"""A retry that waits longer than that begins a trace of its own."""

MAX_LINKS: Final = 128
"""What OpenTelemetry's SDK keeps of a span's links."""

_ids = RandomIdGenerator()


class Relation(StrEnum):
    """Why a task's execution has a trace of its own; the value is what the asker's link says of the new trace."""

    SCHEDULED = "scheduled_as"
    REPLAYED = "replayed_as"
    RETRIED = "retried_as"

    @property
    def asked_by(self) -> str:
        """What the new trace's link says of the span that asked for it."""
        return _ASKED_BY[self]

    @property
    def of(self) -> str:
        """What the new trace's link says of the task that it is another try of."""
        return _OF[self]


_ASKED_BY: Final = {
    Relation.SCHEDULED: "scheduled_by",
    Relation.REPLAYED: "replayed_by",
    Relation.RETRIED: "retried_by",
}
_OF: Final = {Relation.SCHEDULED: "schedule_of", Relation.REPLAYED: "replay_of", Relation.RETRIED: "retry_of"}


@dataclass(frozen=True, slots=True)
class Creation:
    """The context that a message is created under.

    Attributes:
        traceparent: What the message carries; None outside any trace.
        links: Traceparents that the message's own trace is linked to, by what they are to it. Empty for a message
            that goes on in the trace of whoever sends it.
        baggage: What the caller wants everyone on the way to know, as far as it may pass.
    """

    traceparent: str | None = None
    links: Mapping[str, str] = field(default_factory=dict)
    baggage: str | None = None

    def headers(self) -> dict[str, Any]:
        """What a message of a task says of it."""
        headers: dict[str, Any] = {}
        if self.traceparent:
            headers["traceparent"] = self.traceparent
        if self.links:
            headers[TRACE_LINKS_HEADER] = dict(self.links)
        if self.baggage:
            headers[baggage.HEADER] = self.baggage
        return headers

    @property
    def trace_id(self) -> str | None:
        """In 32 hex digits."""
        return logs.trace_id_of(self.traceparent)

    @property
    def span_id(self) -> str | None:
        """In 16 hex digits."""
        return _part(self.traceparent, 2, 16)


def going_on() -> Creation:
    """The message goes on in the current trace."""
    return Creation(telemetry.current_traceparent(), baggage=baggage.current())


def beginning(relation: Relation, *, of: str | None = None) -> Creation:
    """The message begins a trace of its own; the current span is linked to it, and it to the current span.

    Whether it is recorded is inherited. Outside any trace there is nothing to link, and none begins.

    Args:
        relation: Why.
        of: The traceparent of what is tried again, as well.
    """
    span = trace.get_current_span()
    asker = span.get_span_context()
    if not asker.is_valid:
        return Creation()
    begun = SpanContext(
        _ids.generate_trace_id(), _ids.generate_span_id(), is_remote=False, trace_flags=asker.trace_flags
    )
    span.add_link(begun, {"taskmesh.link": relation.value})
    links = {relation.asked_by: traceparent_of(asker)} | ({relation.of: of} if of else {})
    return Creation(traceparent_of(begun), links, baggage.current())


def due(due_at: datetime | None) -> Creation:
    """For what is asked for a time of its own a trace of its own; what is wanted at once goes on in this one."""
    is_later = due_at is not None and due_at > datetime.now(UTC)
    return beginning(Relation.SCHEDULED) if is_later else going_on()


def traceparent_of(context: SpanContext) -> str:
    """The W3C `traceparent` of a span."""
    sampled = TraceFlags.SAMPLED if context.trace_flags.sampled else TraceFlags.DEFAULT
    return f"00-{trace.format_trace_id(context.trace_id)}-{trace.format_span_id(context.span_id)}-{sampled:02x}"


def traceparent(trace_id: str | None, span_id: str | None) -> str | None:
    """The `traceparent` of a span that was kept by its ids; None if it was not."""
    # Of what was sampled by then nothing is known; a link to nothing does no harm.
    return f"00-{trace_id}-{span_id}-01" if trace_id and span_id else None


def context_of(traceparent: str | None) -> SpanContext:
    """The span that a `traceparent` names; an invalid one when it names none."""
    return trace.get_current_span(telemetry.extract({"traceparent": traceparent})).get_span_context()


def links_to(traceparents: Mapping[str, str]) -> list[Link]:
    """Links by what each traceparent is to the span that will have them."""
    named = ((relation, context_of(traceparent)) for relation, traceparent in traceparents.items())
    return [Link(context, {"taskmesh.link": relation}) for relation, context in named if context.is_valid]


def members(traceparents: set[str]) -> list[Link]:
    """Links of a batch to the traces of its members: a span has one parent, and these are many."""
    contexts = (context_of(traceparent) for traceparent in sorted(traceparents)[:MAX_LINKS])
    return [Link(context) for context in contexts if context.is_valid]


def unrecorded() -> Creation:
    """A trace that nobody records; its id costs nothing, and names the task's log lines."""
    ids = SpanContext(_ids.generate_trace_id(), _ids.generate_span_id(), is_remote=False, trace_flags=TraceFlags(0))
    return Creation(traceparent_of(ids))


def _part(traceparent: str | None, place: int, length: int) -> str | None:
    parts = (traceparent or "").split("-")
    return parts[place] if len(parts) >= 4 and len(parts[place]) == length else None
