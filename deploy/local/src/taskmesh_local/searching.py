"""What can be asked of the kept traces, and what a span can be found by."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from taskmesh.parts.spans import Span
from taskmesh_local.overview import WORK

# Longer texts are stack traces and the like: nobody types them into a search.
LONGEST_WORD = 100
LENGTH = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>µs|us|ms|s|m|min|h|d)?")
MILLISECONDS = {
    "µs": 0.001,
    "us": 0.001,
    "ms": 1,
    "s": 1000,
    "m": 60_000,
    "min": 60_000,
    "h": 3_600_000,
    "d": 86_400_000,
}
# What SQLite can compare.
LARGEST = 2**63 - 1


def milliseconds(text: Any) -> Any:
    """Read `250ms`, `1.5 s`, `2m` or `1h`; a bare number counts milliseconds.

    Raises:
        ValueError: It is none of these.
    """
    if not isinstance(text, str):
        return text
    read = LENGTH.fullmatch(text.strip().lower())
    if read is None:
        raise ValueError(f"{text!r} is no length of time: write 250ms, 1.5s, 2m or 1h")
    return float(read["number"]) * MILLISECONDS[read["unit"] or "ms"]


def in_utc(at: datetime) -> datetime:
    """The moment in UTC; a time without a zone is the machine's own.

    Raises:
        ValueError: There is no such moment in UTC, as with the first hours of the year 1.
    """
    try:
        return at.astimezone(UTC)
    except OverflowError as error:
        raise ValueError(f"{at} is out of range") from error


Length = Annotated[float, BeforeValidator(milliseconds)]
Moment = Annotated[datetime, AfterValidator(in_utc)]


class TraceQuery(BaseModel):
    """Which traces to list; every condition that is given must hold.

    Attributes:
        q: Words. Each must be the beginning of a word, an id or another text in a span, or of the trace's id.
        service: With a span of this service.
        type: With an attempt at, or a submission of, a task of this type.
        task: Of this task.
        error: With this failure: its code, or the class of the exception with or without its module.
        errors: With a failed span.
        shortest, longest: How long the trace is, from the first wait or span to the end of the last.
        within: Begun no longer ago than this.
        since, until: Begun in this time; a time without a zone is the machine's own.
        linked, span: Linking to this trace, and to this span of it.
        background: Also batches of messages, which belong to no one request, and requests that only read and did not
            fail.
        before: Older than this trace, which was the last of the page before.
    """

    model_config = ConfigDict(populate_by_name=True)

    limit: Annotated[int, Field(ge=1, le=1000)] = 100
    q: str = ""
    service: str = ""
    type: str = ""
    task: str = ""
    error: str = ""
    errors: bool = False
    shortest: Annotated[Length | None, Field(alias="min")] = None
    longest: Annotated[Length | None, Field(alias="max")] = None
    within: Length | None = None
    since: Moment | None = None
    until: Moment | None = None
    linked: str = ""
    span: str = ""
    background: bool = True
    before: str = ""

    @model_validator(mode="before")
    @classmethod
    def _leave_out_empty_fields(cls, given: Any) -> Any:
        """A form sends the fields that nobody has filled in, too."""
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if not (isinstance(value, str) and not value.strip())}

    def condition(self, now: datetime) -> tuple[str, dict[str, Any]]:
        """A WHERE clause on `traces` that indexes can answer, and its values."""
        clauses, values = [], dict[str, Any]()
        for clause, some in self._parts(now):
            clauses.append(clause)
            values |= some
        return " AND ".join(clauses) or "TRUE", values

    def _parts(self, now: datetime) -> Iterator[tuple[str, dict[str, Any]]]:
        if not self.background:
            yield "sort = :sort", {"sort": WORK}
        if self.errors:
            yield "errors > 0", {}
        for facet in ("service", "type", "task", "error"):
            if value := getattr(self, facet).strip().lower():
                found = f"SELECT trace FROM facets WHERE facet = '{facet}' AND value = :{facet}"  # noqa: S608 - constants
                yield f"id IN ({found})", {facet: value}
        for number, word in enumerate(self.q.lower().split()):
            # Ordered as bytes are, everything that begins with a word is between it and it with the last character.
            low, high = f":low{number}", f":high{number}"
            words = f"SELECT trace FROM words WHERE word >= {low} AND word < {high}"  # noqa: S608 - constants
            yield (
                f"(id IN ({words}) OR trace_id >= {low} AND trace_id < {high})",
                {low[1:]: word, high[1:]: f"{word}\U0010ffff"},
            )
        yield from self._bounds(now)
        if self.linked:
            links = "SELECT trace_id FROM links WHERE to_trace = :linked AND (:span = '' OR to_span = :span)"
            yield f"trace_id IN ({links})", {"linked": self.linked.lower(), "span": self.span.lower()}

    def _bounds(self, now: datetime) -> Iterator[tuple[str, dict[str, Any]]]:
        if self.shortest is not None:
            yield "ended - begun >= :shortest", {"shortest": self.shortest * 1e6}
        if self.longest is not None:
            yield "ended - begun <= :longest", {"longest": self.longest * 1e6}
        if self.within is not None:
            yield "begun >= :within", {"within": _nanoseconds(now) - self.within * 1e6}
        if self.since is not None:
            yield "begun >= :since", {"since": _nanoseconds(self.since)}
        if self.until is not None:
            yield "begun <= :until", {"until": _nanoseconds(self.until)}


def _nanoseconds(at: datetime) -> int:
    delta = at - datetime(1970, 1, 1, tzinfo=UTC)
    nanoseconds = (delta.days * 86_400 + delta.seconds) * 10**9 + delta.microseconds * 1000
    return min(max(nanoseconds, 0), LARGEST)


def facets(span: Span) -> set[tuple[str, str]]:
    """What a span can be found by exactly, in lower case."""
    found = {("service", span.service)}
    for facet, attribute in (("task", "taskmesh.task.id"), ("type", "taskmesh.task.type")):
        if value := span.attributes.get(attribute):
            found.add((facet, str(value)))
    if span.kind == "consumer" and span.parent_id:
        found.add(("type", span.name.removeprefix("process ")))
    found |= {("error", error) for error in _errors(span)}
    return {(facet, value.lower()) for facet, value in found}


def _errors(span: Span) -> Iterator[str]:
    """The code of a failure, its exception, and the exception without its module."""
    for value in (span.message, span.attributes.get("error.type", "")):
        if span.failed and value and len(str(value)) <= LONGEST_WORD:
            yield str(value)
            yield re.split(r"[.:]", str(value))[-1]


def words(span: Span) -> set[str]:
    """What a span can be found by when only the beginning of it is typed, in lower case."""
    names = [span.service, span.name, span.message]
    values = [str(value) for value in span.attributes.values() if not isinstance(value, bool)]
    found: set[str] = set()
    for text in (*names, *values):
        for word in text.lower().split():
            # "billing.invoice.issue" is found by "billing.inv", and by "invoice".
            found |= {word, *(re.split(r"[\W_]+", word) if text in names else ())}
    return {word for word in found if 1 < len(word) <= LONGEST_WORD}
