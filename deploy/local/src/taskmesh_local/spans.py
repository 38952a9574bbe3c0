"""The spans that the trace page has received, and traces made of them."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from taskmesh.parts.spans import Span, SpanLink
from taskmesh_local import attempts, searching
from taskmesh_local.attempts import Mark
from taskmesh_local.overview import Overview, overview
from taskmesh_local.searching import TraceQuery
from taskmesh_local.sqlite import opened

# Of each sort: requests that only read, and batches of messages, do not push out the requests for work. The oldest go
# first. Some hundred megabytes at most.
KEPT_TRACES = 10_000

# Raised with the tables, and with what spans are found by: what an older release kept is forgotten then, for a
# laptop's traces are no archive.
VERSION = 2
SCHEMA = f"""
BEGIN;
DROP TABLE IF EXISTS spans;
DROP TABLE IF EXISTS traces;
DROP TABLE IF EXISTS facets;
DROP TABLE IF EXISTS words;
DROP TABLE IF EXISTS links;
CREATE TABLE spans (
    trace_id TEXT NOT NULL,
    span_id TEXT NOT NULL,
    parent_id TEXT NOT NULL,
    service TEXT NOT NULL,
    name TEXT NOT NULL,
    kind TEXT NOT NULL,
    begun INTEGER NOT NULL,
    ended INTEGER NOT NULL,
    failed INTEGER NOT NULL,
    waited_from INTEGER NOT NULL,
    task_id TEXT NOT NULL,
    task_type TEXT NOT NULL,
    attempt INTEGER NOT NULL,
    outcome TEXT NOT NULL,
    late INTEGER NOT NULL,
    batch INTEGER NOT NULL,
    span TEXT NOT NULL,
    PRIMARY KEY (trace_id, span_id)
);
CREATE TABLE traces (
    id INTEGER PRIMARY KEY,
    trace_id TEXT NOT NULL UNIQUE,
    sort TEXT NOT NULL,
    begun INTEGER NOT NULL,
    ended INTEGER NOT NULL,
    running INTEGER NOT NULL,
    waiting INTEGER NOT NULL,
    spans INTEGER NOT NULL,
    errors INTEGER NOT NULL,
    orphans INTEGER NOT NULL,
    late INTEGER NOT NULL,
    retries INTEGER NOT NULL,
    tasks INTEGER NOT NULL,
    state TEXT NOT NULL,
    services TEXT NOT NULL,
    name TEXT NOT NULL,
    service TEXT NOT NULL,
    task TEXT NOT NULL
);
CREATE INDEX traces_begun ON traces (begun, trace_id);
CREATE INDEX traces_sort ON traces (sort, begun, trace_id);
CREATE TABLE facets (
    facet TEXT NOT NULL,
    value TEXT NOT NULL,
    trace INTEGER NOT NULL,
    PRIMARY KEY (facet, value, trace)
) WITHOUT ROWID;
CREATE TABLE words (
    word TEXT NOT NULL,
    trace INTEGER NOT NULL,
    PRIMARY KEY (word, trace)
) WITHOUT ROWID;
CREATE TABLE links (
    trace_id TEXT NOT NULL,
    span_id TEXT NOT NULL,
    position INTEGER NOT NULL,
    to_trace TEXT NOT NULL,
    to_span TEXT NOT NULL,
    relation TEXT NOT NULL,
    PRIMARY KEY (trace_id, span_id, position)
) WITHOUT ROWID;
CREATE INDEX links_to ON links (to_trace, to_span);
PRAGMA user_version = {VERSION};
COMMIT;
"""

SPAN_FIELDS = [field.name for field in fields(Span)]
MARKS = ", ".join(Mark._fields)
LINE = ", ".join(field.name for field in fields(Overview))
LINE_OF_OTHER = ", ".join(f"other.{field.name}" for field in fields(Overview))
CHANGED = ", ".join(f"{field.name} = excluded.{field.name}" for field in fields(Overview))


@dataclass(frozen=True, slots=True)
class Found:
    """One page of a list of traces.

    Attributes:
        total: How many there are on all pages together.
        next: What to ask for to see older ones; None on the last page.
    """

    traces: list[Overview]
    total: int
    next: str | None


@dataclass(frozen=True, slots=True)
class Link:
    """A span link as one of its two ends sees it.

    Attributes:
        span_id: The span at this end; empty where the other end names a trace alone.
        other_trace, other_span: The other end.
        other: Its trace, as far as it has come.
        outgoing: Whether this end made the link.
        relation: The value of `taskmesh.link`, in the words of the end that made the link; empty without one.
    """

    span_id: str
    other_trace: str
    other_span: str
    relation: str
    outgoing: bool
    other: Overview | None


class Spans:
    """A file of spans that survives the page being killed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with opened(self._path) as database:
            database.execute("PRAGMA journal_mode = WAL")
            if database.execute("PRAGMA user_version").fetchone()[0] != VERSION:
                database.executescript(SCHEMA)

    def add(self, spans: Sequence[Span]) -> None:
        """Keep spans; one that came before is replaced."""
        marks = [attempts.mark(span) for span in spans]
        rows = [(span.trace_id, *each, _text(span)) for span, each in zip(spans, marks, strict=True)]
        with opened(self._path) as database:
            places = ", ".join("?" * (len(Mark._fields) + 2))
            database.executemany(f"INSERT OR REPLACE INTO spans VALUES ({places})", rows)  # noqa: S608 - constants
            ids = {trace_id: _sum_up(database, trace_id) for trace_id in {span.trace_id for span in spans}}
            _index(database, spans, ids)
            _forget(database)

    def find(self, wanted: TraceQuery) -> Found:
        """The newest traces first."""
        where, values = wanted.condition(datetime.now(UTC))
        newer = "(begun, trace_id) < (SELECT begun, trace_id FROM traces WHERE trace_id = :before)"
        page = f"{where} AND {newer}" if wanted.before else where
        values |= {"before": wanted.before, "limit": wanted.limit + 1}
        select = f"SELECT {LINE} FROM traces WHERE {page} ORDER BY begun DESC, trace_id DESC LIMIT :limit"  # noqa: S608 - made of constants
        with opened(self._path) as database:
            found = [_overview(row) for row in database.execute(select, values)]
            [total] = database.execute(f"SELECT count(*) FROM traces WHERE {where}", values).fetchone()  # noqa: S608 - made of constants
        shown = found[: wanted.limit]
        return Found(shown, total, shown[-1].trace_id if len(found) > wanted.limit else None)

    def choices(self, facet: str) -> list[str]:
        """The values of a facet that some kept trace has."""
        with opened(self._path) as database:
            select = "SELECT DISTINCT value FROM facets WHERE facet = ? ORDER BY value"
            return [value for (value,) in database.execute(select, (facet,))]

    def get(self, trace_id: str) -> tuple[Overview, list[Span]] | None:
        """A trace's line and its spans by their beginning; None if no span of it is known."""
        with opened(self._path) as database:
            row = database.execute(f"SELECT {LINE} FROM traces WHERE trace_id = ?", (trace_id,)).fetchone()  # noqa: S608 - a constant
            select = "SELECT span FROM spans WHERE trace_id = ? ORDER BY begun, span_id"
            spans = [_span(text) for (text,) in database.execute(select, (trace_id,))]
        return (_overview(row), spans) if row else None

    def links_from(self, trace_id: str, span_id: str = "") -> list[Link]:
        """The links that the spans of this trace have made; given a span, only those of that one."""
        select = f"""
            SELECT span_id, to_trace, to_span, relation, {LINE_OF_OTHER} FROM links
            LEFT JOIN traces AS other ON other.trace_id = to_trace
            WHERE links.trace_id = ? AND (? = '' OR span_id = ?) ORDER BY span_id, position
        """  # noqa: S608 - a constant
        return self._links(select, (trace_id, span_id, span_id), outgoing=True)

    def links_to(self, trace_id: str, span_id: str = "", *, batches: bool, limit: int) -> list[Link]:
        """The links that others have made to this trace, or to one span of it, the newest first.

        Args:
            trace_id: The trace.
            span_id: A span of it; empty for links to any span.
            batches: Either the links of batches of messages, or all others.
            limit: How many at most.
        """
        select = f"""
            SELECT to_span, links.trace_id, span_id, relation, {LINE_OF_OTHER} FROM links
            JOIN traces AS other ON other.trace_id = links.trace_id
            WHERE to_trace = ? AND (? = '' OR to_span = ?) AND (other.sort = 'batch') = ?
            ORDER BY other.begun DESC LIMIT ?
        """  # noqa: S608 - a constant
        return self._links(select, (trace_id, span_id, span_id, batches, limit), outgoing=False)

    def _links(self, select: str, values: Sequence[Any], *, outgoing: bool) -> list[Link]:
        with opened(self._path) as database:
            rows = database.execute(select, values).fetchall()
        return [_link(row, outgoing=outgoing) for row in rows]


def _sum_up(database: sqlite3.Connection, trace_id: str) -> int:
    """Write a trace's line anew: its spans arrive from several processes, in any order, and twice. Its row's id."""
    marks = [Mark(*row) for row in database.execute(f"SELECT {MARKS} FROM spans WHERE trace_id = ?", (trace_id,))]  # noqa: S608 - a constant
    line = overview(trace_id, marks)
    values = [json.dumps(line.services) if name == "services" else getattr(line, name) for name in LINE.split(", ")]
    upsert = f"""
        INSERT INTO traces ({LINE}) VALUES ({", ".join("?" * len(values))})
        ON CONFLICT (trace_id) DO UPDATE SET {CHANGED} RETURNING id
    """  # noqa: S608 - constants
    [(number,)] = database.execute(upsert, values).fetchall()
    return int(number)


def _index(database: sqlite3.Connection, spans: Iterable[Span], ids: dict[str, int]) -> None:
    found_by = {(facet, value, ids[span.trace_id]) for span in spans for facet, value in searching.facets(span)}
    database.executemany("INSERT OR IGNORE INTO facets VALUES (?, ?, ?)", found_by)
    words = {(word, ids[span.trace_id]) for span in spans for word in searching.words(span)}
    database.executemany("INSERT OR IGNORE INTO words VALUES (?, ?)", words)
    links = [row for span in spans for row in _rows_of_links(span)]
    database.executemany("INSERT OR REPLACE INTO links VALUES (?, ?, ?, ?, ?, ?)", links)


def _rows_of_links(span: Span) -> Iterator[tuple[Any, ...]]:
    for position, link in enumerate(span.links):
        relation = str(link.attributes.get("taskmesh.link", ""))
        yield span.trace_id, span.span_id, position, link.trace_id, link.span_id, relation


def _forget(database: sqlite3.Connection) -> None:
    """Drop the oldest traces of each sort beyond those that are kept."""
    for sort, count in database.execute("SELECT sort, count(*) FROM traces GROUP BY sort").fetchall():
        old = "SELECT id, trace_id FROM traces WHERE sort = ? ORDER BY begun, trace_id LIMIT ?"
        for number, trace_id in database.execute(old, (sort, max(0, count - KEPT_TRACES))).fetchall():
            _drop(database, number, trace_id)


def _drop(database: sqlite3.Connection, number: int, trace_id: str) -> None:
    texts = database.execute("SELECT span FROM spans WHERE trace_id = ?", (trace_id,)).fetchall()
    spans = [_span(text) for (text,) in texts]
    # By what it is found by, which is cheaper than a second index on each of the two tables.
    found_by = {(*facet, number) for span in spans for facet in searching.facets(span)}
    database.executemany("DELETE FROM facets WHERE facet = ? AND value = ? AND trace = ?", found_by)
    words = {(word, number) for span in spans for word in searching.words(span)}
    database.executemany("DELETE FROM words WHERE word = ? AND trace = ?", words)
    for table in ("links", "spans", "traces"):
        database.execute(f"DELETE FROM {table} WHERE trace_id = ?", (trace_id,))  # noqa: S608 - constants


def _link(row: Sequence[Any], *, outgoing: bool) -> Link:
    span_id, other_trace, other_span, relation, *other = row
    # Of a trace that has not come, an outer join has nothing.
    return Link(span_id, other_trace, other_span, relation, outgoing, _overview(other) if other[0] else None)


def _text(span: Span) -> str:
    # Not by `asdict`, which would copy every attribute first.
    shown = {name: getattr(span, name) for name in SPAN_FIELDS}
    return json.dumps(shown, separators=(",", ":"), default=asdict)


def _span(text: str) -> Span:
    values = json.loads(text)
    links = tuple(SpanLink(**link) for link in values.pop("links"))
    return Span(**values | {"links": links, "events": tuple(values["events"])})


def _overview(row: Sequence[Any]) -> Overview:
    values = dict(zip((field.name for field in fields(Overview)), row, strict=True))
    return Overview(**values | {"services": tuple(json.loads(values["services"]))})
