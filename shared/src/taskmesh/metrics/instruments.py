"""Instruments: declared once, recorded through from anywhere, and free of charge while nobody exports.

An instrument does nothing until the process has a sink: the provider's, or in a pool child the way to its parent.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Final, Protocol

from opentelemetry import trace
from opentelemetry.trace import SpanContext, TraceFlags

OTHER: Final = "other"
"""What an attribute says in place of a value that it does not admit."""

_TRACEPARENT: Final = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


class Kind(StrEnum):
    COUNTER = "counter"
    HISTOGRAM = "histogram"
    GAUGE = "gauge"


class Attribute:
    """An attribute of measurements, with a bounded number of values: what does not fit, or is too many, is `other`.

    Args:
        name: As it is exported.
        values: All that there are; None for those that fit the pattern.
        pattern: A regular expression for the whole value.
        limit: How many different values a process admits, the first that come.
    """

    def __init__(
        self, name: str, *, values: Iterable[str] | None = None, pattern: str = r"[\w.:+-]{1,64}", limit: int = 50
    ) -> None:
        self.name = name
        self._known = set(values or ())
        self._pattern = re.compile(pattern)
        self._room = limit if values is None else 0

    def admit(self, value: str) -> str:
        """The value, or `other`."""
        if value in self._known:
            return value
        if len(self._known) >= self._room or self._pattern.fullmatch(value) is None:
            return OTHER
        self._known.add(value)
        return value


class Sink(Protocol):
    """Takes measurements."""

    def measure(
        self, instrument: Instrument, value: float, attributes: Mapping[str, str], origin: SpanContext | None
    ) -> None:
        """Take one; never waits, and never raises.

        Args:
            origin: The span that a length of time is an example of.
        """


class Instrument:
    """One metric.

    Args:
        name: OpenTelemetry's, with dots.
        unit: In UCUM's notation: `s`, `1`, or what is counted in braces.
        attributes: Which a measurement may have. In calls their names are written with underscores for dots.
    """

    kind: Kind

    def __init__(self, name: str, unit: str, description: str, *attributes: Attribute) -> None:
        self.name = name
        self.unit = unit
        self.description = description
        self.attributes = attributes
        self._by_keyword = {attribute.name.replace(".", "_"): attribute for attribute in attributes}
        _declared[name] = self

    def _admitted(self, given: Mapping[str, str | None]) -> dict[str, str]:
        by_keyword = self._by_keyword
        return {
            (attribute := by_keyword[keyword]).name: attribute.admit(value)
            for keyword, value in given.items()
            if value is not None
        }


class Counter(Instrument):
    """Counts what has happened."""

    kind = Kind.COUNTER

    def add(self, amount: int = 1, /, **attributes: str | None) -> None:
        """Count; an attribute that is None is left out."""
        if _sink is not None:
            _sink.measure(self, amount, self._admitted(attributes), None)


class Histogram(Instrument):
    """Keeps how measurements are distributed over the buckets of `aggregates.BUCKETS_SECONDS`."""

    kind = Kind.HISTOGRAM

    def record(self, seconds: float, traceparent: object = None, /, **attributes: str | None) -> None:
        """Record one length of time; one below nothing, which clocks that differ make, is nothing.

        Args:
            traceparent: The trace that this is an example of; None for the current one.
        """
        if _sink is not None:
            _sink.measure(self, max(0.0, seconds), self._admitted(attributes), origin_of(traceparent))


Shown = tuple[float, Mapping[str, str]]


class Gauge(Instrument):
    """Says how things are. Only the process that exports can: what a pool child shows is seen by nobody."""

    kind = Kind.GAUGE

    def __init__(self, name: str, unit: str, description: str, *attributes: Attribute) -> None:
        super().__init__(name, unit, description, *attributes)
        self._look: Callable[[], Iterable[Shown]] | None = None

    def show(self, values: Iterable[tuple[float, Mapping[str, str | None]]]) -> None:
        """Say this from now on, with each value's attributes by keyword; what was said before is forgotten."""
        shown = [(value, self._admitted(attributes)) for value, attributes in values]
        self._look = lambda: shown

    def watch(self, look: Callable[[], float]) -> None:
        """Have a number without attributes looked up whenever it is exported, on another thread."""
        self._look = lambda: [(look(), {})]

    def hide(self) -> None:
        """Say nothing any more: an old figure would be taken for a new one."""
        self._look = None

    def read(self) -> Sequence[Shown]:
        """What is said at the moment; values whose attributes became the same are added up."""
        look = self._look
        sums: dict[tuple[tuple[str, str], ...], float] = {}
        for value, attributes in look() if look is not None else ():
            key = tuple(attributes.items())
            sums[key] = sums.get(key, 0) + value
        return [(value, dict(key)) for key, value in sums.items()]


def declared() -> Iterable[Instrument]:
    """Every instrument of the program."""
    return tuple(_declared.values())


def find(name: str) -> Instrument | None:
    """The instrument of that name, if this process knows one."""
    return _declared.get(name)


def is_on() -> bool:
    """True if somebody exports what is measured: what costs a query need not be looked up otherwise."""
    return _sink is not None


def sink() -> Sink | None:
    """What takes this process's measurements; None while nobody exports."""
    return _sink


def send_to(sink: Sink | None) -> None:
    """Have every measurement of this process taken by the sink; None takes none."""
    global _sink  # noqa: PLW0603 - one for the process, like OpenTelemetry's own providers
    _sink = sink


def origin_of(traceparent: object) -> SpanContext | None:
    """The span that a measurement is an example of, if it is recorded: the one that is named, or the current one."""
    if traceparent is None:
        span = trace.get_current_span().get_span_context()
    else:
        # It comes from messages, in which anything can be.
        parts = _TRACEPARENT.fullmatch(traceparent) if isinstance(traceparent, str) else None
        if parts is None:
            return None
        ids = int(parts[1], 16), int(parts[2], 16)
        span = SpanContext(*ids, is_remote=True, trace_flags=TraceFlags(int(parts[3], 16)))
    return span if span.is_valid and span.trace_flags.sampled else None


_declared: dict[str, Instrument] = {}
_sink: Sink | None = None
