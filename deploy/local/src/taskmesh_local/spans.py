"""The spans that the trace page has received, and traces made of them."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field

from taskmesh.parts.spans import Span
from taskmesh_local.sqlite import opened

# The oldest traces go first; far more than a person looks at, and some hundred megabytes at most.
KEPT_TRACES = 5000

SCHEMA = """
CREATE TABLE IF NOT EXISTS spans (
    trace_id TEXT NOT NULL,
    span_id TEXT NOT NULL,
    parent_id TEXT NOT NULL,
    service TEXT NOT NULL,
    name TEXT NOT NULL,
    kind TEXT NOT NULL,
    begun INTEGER NOT NULL,
    ended INTEGER NOT NULL,
    failed INTEGER NOT NULL,
    span TEXT NOT NULL,
    PRIMARY KEY (trace_id, span_id)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS traces (
    trace_id TEXT PRIMARY KEY,
    begun INTEGER NOT NULL,
    ended INTEGER NOT NULL,
    spans INTEGER NOT NULL,
    errors INTEGER NOT NULL,
    orphans INTEGER NOT NULL,
    services TEXT NOT NULL,
    name TEXT NOT NULL,
    service TEXT NOT NULL,
    kind TEXT NOT NULL,
    task TEXT
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS traces_begun ON traces (begun);
"""

# A trace's line is counted anew when spans of it come: they arrive from several processes, in any order, and twice.
COUNT = """
INSERT OR REPLACE INTO traces
SELECT trace_id, min(begun), max(ended), count(*), sum(failed),
    (SELECT count(*) FROM spans AS child WHERE child.trace_id = spans.trace_id AND child.parent_id <> ''
        AND NOT EXISTS (SELECT 1 FROM spans AS parent
            WHERE parent.trace_id = child.trace_id AND parent.span_id = child.parent_id)),
    (SELECT group_concat(service) FROM (SELECT service FROM spans AS each WHERE each.trace_id = spans.trace_id
        GROUP BY service ORDER BY min(begun))),
    (SELECT name FROM spans AS root WHERE root.trace_id = spans.trace_id ORDER BY parent_id <> '', begun LIMIT 1),
    (SELECT service FROM spans AS root WHERE root.trace_id = spans.trace_id ORDER BY parent_id <> '', begun LIMIT 1),
    (SELECT kind FROM spans AS root WHERE root.trace_id = spans.trace_id ORDER BY parent_id <> '', begun LIMIT 1),
    (SELECT name FROM spans AS first WHERE first.trace_id = spans.trace_id AND kind = 'consumer' AND parent_id <> ''
        ORDER BY begun LIMIT 1)
FROM spans WHERE trace_id = ? GROUP BY trace_id
"""


class TraceQuery(BaseModel):
    """Which traces to list.

    Attributes:
        service: Only those with a span of this service.
        q: Only those with this text in a span, whatever its case; or the one with this trace id.
        errors: Only those with a failed span.
        background: Also those that begin with a consumer (batches of messages, which belong to no one request), and
            those that only read and did not fail.
    """

    limit: Annotated[int, Field(ge=1, le=1000)] = 100
    service: str = ""
    q: str = ""
    errors: bool = False
    background: bool = True


@dataclass(frozen=True, slots=True)
class TraceSpan:
    """A span at its place in the tree of its trace."""

    span: Span
    depth: int
    orphan: bool
    start_ms: float
    duration_ms: float

    def to_json(self) -> dict[str, Any]:
        shown = asdict(self.span)
        for name in ("trace_id", "start_nanoseconds", "end_nanoseconds"):
            del shown[name]
        return shown | {"start_ms": self.start_ms, "duration_ms": self.duration_ms, "orphan": self.orphan}


class Spans:
    """A file of spans that survives the page being killed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with opened(self._path) as database:
            database.execute("PRAGMA journal_mode = WAL")
            database.executescript(SCHEMA)

    def add(self, spans: Sequence[Span]) -> None:
        """Keep spans; one that came before is replaced."""
        rows = [
            (
                *(s.trace_id, s.span_id, s.parent_id, s.service, s.name, s.kind),
                *(s.start_nanoseconds, s.end_nanoseconds, s.failed, json.dumps(asdict(s))),
            )
            for s in spans
        ]
        with opened(self._path) as database:
            database.executemany("INSERT OR REPLACE INTO spans VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
            database.executemany(COUNT, [(trace_id,) for trace_id in {span.trace_id for span in spans}])
            self._forget(database)

    def find(self, wanted: TraceQuery) -> list[dict[str, Any]]:
        """The newest traces first."""
        where = """
            SELECT trace_id, begun, ended, spans, errors, orphans, services, name, service, task FROM traces
            WHERE (:service = '' OR ',' || services || ',' LIKE '%,' || :service || ',%')
              AND (NOT :errors OR errors > 0)
              AND (:background OR kind <> 'consumer' AND (name NOT LIKE 'GET %' OR spans > 1 OR errors > 0))
              AND (:q = '' OR trace_id = :q OR EXISTS (
                  SELECT 1 FROM spans WHERE spans.trace_id = traces.trace_id AND instr(lower(span), lower(:q)) > 0))
            ORDER BY begun DESC LIMIT :limit
        """
        with opened(self._path) as database:
            rows = database.execute(where, wanted.model_dump())
            return [_summary(row) for row in rows.fetchall()]

    def services(self) -> list[str]:
        """Every service that has sent a span."""
        with opened(self._path) as database:
            return [row[0] for row in database.execute("SELECT DISTINCT service FROM spans ORDER BY service")]

    def get(self, trace_id: str) -> tuple[dict[str, Any], list[TraceSpan]] | None:
        """A trace's line and its spans, each behind its parent; None if no span of it is known."""
        columns = "trace_id, begun, ended, spans, errors, orphans, services, name, service, task"
        with opened(self._path) as database:
            row = database.execute(f"SELECT {columns} FROM traces WHERE trace_id = ?", (trace_id,)).fetchone()  # noqa: S608 - a constant
            found = database.execute("SELECT span FROM spans WHERE trace_id = ? ORDER BY begun", (trace_id,)).fetchall()
        if row is None:
            return None
        return _summary(row), _tree([Span(**json.loads(span)) for (span,) in found])

    def _forget(self, database: sqlite3.Connection) -> None:
        old = "SELECT trace_id FROM traces ORDER BY begun DESC LIMIT -1 OFFSET ?"
        gone = database.execute(old, (KEPT_TRACES,)).fetchall()
        database.executemany("DELETE FROM spans WHERE trace_id = ?", gone)
        database.executemany("DELETE FROM traces WHERE trace_id = ?", gone)


def _summary(row: tuple[Any, ...]) -> dict[str, Any]:
    trace_id, begun, ended, spans, errors, orphans, services, name, service, task = row
    return {
        "trace_id": trace_id,
        "name": name,
        "service": service,
        # "process billing.invoice.issue": the task that the request asked for.
        "task": (task or "").removeprefix("process "),
        "services": services.split(","),
        "started_at": datetime.fromtimestamp(begun / 1e9, UTC)
        .isoformat(timespec="milliseconds")
        .replace("+00:00", "Z"),
        "duration_ms": (ended - begun) / 1e6,
        "spans": spans,
        "errors": errors,
        "orphans": orphans,
    }


def _tree(spans: list[Span]) -> list[TraceSpan]:
    """The spans depth first, siblings by their start; a span whose parent is missing starts a tree of its own."""
    known = {span.span_id for span in spans}
    children: dict[str, list[Span]] = {}
    for span in spans:
        children.setdefault(span.parent_id if span.parent_id in known else "", []).append(span)
    begun = min(span.start_nanoseconds for span in spans)
    placed: list[TraceSpan] = []
    waiting = [(span, 0) for span in reversed(children.get("", ()))]
    while waiting:
        span, depth = waiting.pop()
        start = (span.start_nanoseconds - begun) / 1e6
        duration = (span.end_nanoseconds - span.start_nanoseconds) / 1e6
        orphan = bool(span.parent_id) and span.parent_id not in known
        placed.append(TraceSpan(span, depth, orphan, start, duration))
        waiting += [(child, depth + 1) for child in reversed(children.get(span.span_id, ()))]
    return placed
