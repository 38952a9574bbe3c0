"""Root spans whose ids were given away before they began.

`taskmesh.traces` draws the ids of a trace when work is asked for a later time; the span that takes them begins when the
work does. OpenTelemetry has no argument for that, so its generator of ids and its sampler are asked here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from opentelemetry.context import Context
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import Decision, Sampler, SamplingResult
from opentelemetry.trace import Link, SpanContext, SpanKind, TraceState
from opentelemetry.util.types import Attributes

_promised: ContextVar[SpanContext | None] = ContextVar("taskmesh_promised_span", default=None)


@contextmanager
def promised(ids: SpanContext) -> Iterator[None]:
    """Give these ids to the one span that is begun in the block; its context has to be an empty one."""
    token = _promised.set(ids)
    try:
        yield
    finally:
        _promised.reset(token)


class PromisedIds(RandomIdGenerator):
    """Random ids, but for a promised span."""

    def generate_span_id(self) -> int:
        """The promised one, or a random one."""
        ids = _promised.get()
        return super().generate_span_id() if ids is None else ids.span_id

    def generate_trace_id(self) -> int:
        """The promised one, or a random one."""
        ids = _promised.get()
        return super().generate_trace_id() if ids is None else ids.trace_id


class PromisedSampling(Sampler):
    """Records a promised span if that was promised too, and leaves every other to another sampler."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler

    def should_sample(  # noqa: PLR0917 - the signature of OpenTelemetry
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Attributes = None,
        links: Sequence[Link] | None = None,
        trace_state: TraceState | None = None,
    ) -> SamplingResult:
        """What was decided when the ids were given away, or what the other sampler says."""
        ids = _promised.get()
        if ids is None:
            return self._sampler.should_sample(parent_context, trace_id, name, kind, attributes, links, trace_state)
        if not ids.trace_flags.sampled:
            return SamplingResult(Decision.DROP)
        return SamplingResult(Decision.RECORD_AND_SAMPLE, attributes)

    def get_description(self) -> str:
        """The other sampler's."""
        return self._sampler.get_description()
