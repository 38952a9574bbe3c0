"""W3C Baggage from an allow-list: what a caller wants every service on its request's way to know.

Nothing passes unless the platform team names its key in `TASKMESH_BAGGAGE_KEYS`: baggage travels in clear text through
every service, broker and database, and callers put into it what they like.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from opentelemetry import baggage
from opentelemetry.baggage.propagation import W3CBaggagePropagator
from opentelemetry.context import Context

HEADER = "baggage"
VALUE_MAX_CHARACTERS = 256
"""A longer value is left out: it is kept with each waiting message."""

_PROPAGATOR = W3CBaggagePropagator()
_allowed: frozenset[str] = frozenset()


def allow(keys: Iterable[str]) -> None:
    """Let these keys pass in this process, and no others."""
    global _allowed  # noqa: PLW0603 - one policy for a process, like OpenTelemetry's own propagator
    _allowed = frozenset(keys)


def extract(headers: Mapping[str, object], context: Context) -> Context:
    """The context with what the headers carry and may pass."""
    carried = headers.get(HEADER)
    if not _allowed or not isinstance(carried, str):
        return context
    members = baggage.get_all(_PROPAGATOR.extract({HEADER: carried}, Context()))
    for key, value in members.items():
        if key in _allowed and isinstance(value, str) and len(value) <= VALUE_MAX_CHARACTERS:
            context = baggage.set_baggage(key, value, context)
    return context


def current() -> str | None:
    """What a message carries of the current context's baggage; None when there is none."""
    if not _allowed:
        return None
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier)
    return carrier.get(HEADER)
