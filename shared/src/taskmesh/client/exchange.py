"""How one request becomes one answer, without any I/O.

An operation is a generator: it yields what it needs done and is sent what came of it. Two small drivers do the I/O,
one blocking and one with async/await (drivers.py); retries, time limits and the reading of answers are written once.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeAlias, TypeVar

import httpx
from opentelemetry import propagate

from taskmesh.client.problems import GatewayUnreachable, TaskmeshProblem, problem

ResultT = TypeVar("ResultT")

# The answers to "come back later". A 500 is not among them: it repeats until somebody mends the gateway.
RETRYABLE = frozenset({429, 502, 503, 504})


@dataclass(frozen=True, kw_only=True)
class Request:
    """Wants to be sent; comes back as `Answer` or `Lost`."""

    method: str
    path: str
    query: tuple[tuple[str, str], ...] = ()
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Any = None
    """Sent as JSON; None sends no body."""
    repeatable: bool
    """Whether sending it twice is the same as once: a GET, or a write under an idempotency key."""
    hold_seconds: float = 0.0
    """How much longer than usual the gateway may hold the answer back (`Prefer: wait`)."""
    read_seconds: float = 0.0
    """The longest silence that is not yet a lost connection; set for each try."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    status: int
    headers: httpx.Headers
    body: bytes

    @property
    def ok(self) -> bool:
        return httpx.codes.is_success(self.status)


@dataclass(frozen=True)
class Lost:
    """No answer came, or not all of it."""

    error: httpx.HTTPError

    @property
    def never_sent(self) -> bool:
        """Whether the gateway cannot have seen the request."""
        return isinstance(self.error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout)


@dataclass(frozen=True)
class Pause:
    """Wants time to pass; comes back as None."""

    seconds: float


@dataclass(frozen=True)
class Open:
    """Wants a stream; comes back as `Opened`, `Answer` (of a refusal) or `Lost`."""

    request: Request


@dataclass(frozen=True)
class Opened:
    """An open stream; `handle` belongs to the driver."""

    handle: Any
    status: int


@dataclass(frozen=True)
class Read:
    """Wants the next bytes of a stream; comes back as bytes, empty at its proper end, or as `Lost`."""

    stream: Opened


@dataclass(frozen=True)
class Close:
    """Wants a stream closed; comes back as None."""

    stream: Opened


@dataclass(frozen=True)
class Emit:
    """Hands one value to the caller of an iterating operation; comes back as None."""

    value: Any


Step: TypeAlias = Request | Pause | Open | Read | Close | Emit
Operation: TypeAlias = Generator[Step, Any, ResultT]


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a client goes on trying."""

    total_seconds: float = 30.0
    """For one operation with all its retries; the time for which the gateway is asked to wait is added."""
    read_seconds: float = 10.0
    """For one try."""
    first_pause_seconds: float = 0.1
    longest_pause_seconds: float = 5.0

    def pause(self, tries: int) -> float:
        """The pause after that many tries: doubling, with full jitter so that many clients do not return as one."""
        ceiling = min(self.first_pause_seconds * 2.0 ** min(tries - 1, 16), self.longest_pause_seconds)
        return random.uniform(ceiling / 2, ceiling)  # noqa: S311 - spreads load, guards nothing


class Deadline:
    """A point in time after which nothing more is tried."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self._clock = clock
        self._end = clock() + seconds

    @property
    def remaining(self) -> float:
        return max(self._end - self._clock(), 0.0)


def trace_headers() -> dict[str, str]:
    """The caller's trace, as headers; empty outside any span."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return carrier


def call(request: Request, patience: Patience) -> Operation[Answer]:
    """Send a request until it succeeds, is refused for good, or the time is over.

    A request that may have been seen is only sent again when it is `repeatable`.

    Raises:
        TaskmeshProblem: The gateway's last answer was a refusal.
        GatewayUnreachable: There was no answer at all.
    """
    deadline = Deadline(patience.total_seconds + request.hold_seconds)
    request = replace(request, headers={**trace_headers(), **request.headers})
    tries = 0
    while True:
        tries += 1
        outcome = yield with_read_limit(request, patience, deadline)
        if isinstance(outcome, Answer) and outcome.ok:
            return outcome
        yield from pause_or_raise(outcome, request, deadline, patience, tries)


def pause_or_raise(
    outcome: Answer | Lost, request: Request, deadline: Deadline, patience: Patience, tries: int
) -> Operation[None]:
    """Wait for the next try, or raise what the last one came to."""
    pause = patience.pause(tries)
    if isinstance(outcome, Lost):
        again = request.repeatable or outcome.never_sent
        if not again or pause >= deadline.remaining:
            raise GatewayUnreachable(_describe(outcome, tries)) from outcome.error
    else:
        refusal = read_problem(outcome)
        # A 429 was refused before it was looked at; after the others the request may have been carried out.
        again = outcome.status in RETRYABLE and (request.repeatable or outcome.status == httpx.codes.TOO_MANY_REQUESTS)
        pause = max(pause, refusal.retry_after_seconds or 0.0)
        if not again or pause >= deadline.remaining:
            raise refusal
    yield Pause(pause)


def with_read_limit(request: Request, patience: Patience, deadline: Deadline) -> Request:
    # At least a moment, so that the last try is a try.
    limit = min(patience.read_seconds + request.hold_seconds, max(deadline.remaining, 0.1))
    return replace(request, read_seconds=limit)


def read_problem(answer: Answer) -> TaskmeshProblem:
    return problem(
        answer.status,
        answer.body,
        answer.headers,
        retry_after_seconds=retry_after_seconds(answer.headers),
    )


def retry_after_seconds(headers: httpx.Headers) -> float | None:
    """`Retry-After` in seconds, from either of its forms (RFC 9110, 10.2.3); None when absent or unreadable."""
    value = headers.get("retry-after", "").strip()
    if value.isdecimal():
        return float(value)
    try:
        moment = parsedate_to_datetime(value)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max((moment - datetime.now(UTC)).total_seconds(), 0.0)


def _describe(lost: Lost, tries: int) -> str:
    reason = str(lost.error) or type(lost.error).__name__
    url = lost.error.request.url
    often = "1 try" if tries == 1 else f"{tries} tries"
    return f"no answer from {url.scheme}://{url.netloc.decode()} after {often}: {reason}"
