"""The traces that the page keeps, and how they are found."""

from __future__ import annotations

import re
import sqlite3
import time
from datetime import UTC, datetime, timedelta

import pytest
from fastapi.testclient import TestClient
from opentelemetry.trace import SpanKind

import told_spans
from taskmesh.parts.spans import read_spans
from taskmesh_local import spans as storage
from taskmesh_local.spans import Spans
from taskmesh_local.traces import application
from told_spans import Exports, trace_id


def found(page, query=""):
    return [item["trace_id"] for item in page.get(f"/api/traces?{query}").json()["items"]]


@pytest.fixture
def three(exports):
    """A mail that was sent, a document that was rendered at the third attempt, and an invoice that failed."""
    traces = {}
    for minute, name in enumerate(("mail", "document", "invoice")):
        exports.begin_ms = told_spans.BEGIN_MS + minute * 60_000
        if name == "mail":
            root = exports.submission("email.message.send", name)
            exports.attempt("email-worker", "email.message.send", name, root, due=6, start=20, end=50)
        elif name == "document":
            root = told_spans.retried_task(exports)
        else:
            root = exports.submission("billing.invoice.issue", name)
            exports.attempt(
                "billing-worker", "billing.invoice.issue", name, root, due=6, start=20, end=350, outcome="failed",
                error="InvoiceInvalid",
            )  # fmt: skip
        traces[trace_id(root)] = name
    exports.export()
    return traces


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ("", ["invoice", "document", "mail"]),
        ("service=billing-worker", ["invoice", "document"]),
        ("service=billing", []),
        ("type=email.message.send", ["mail"]),
        ("task=TASK:document", ["document"]),
        ("error=store-unavailable", ["document"]),
        ("error=StoreUnavailable", ["document"]),
        ("error=billing_worker.errors.InvoiceInvalid", ["invoice"]),
        ("errors=true", ["invoice", "document"]),
        ("min=300ms", ["invoice", "document"]),
        ("min=300ms&max=1s", ["invoice"]),
        ("max=0.05s", ["mail"]),
        ("since=2026-11-28T11:51:00Z", ["invoice", "document"]),
        ("since=2026-11-28T11:51:00Z&until=2026-11-28T11:52:00Z", ["document"]),
        ("service=billing-worker&errors=true&max=1s&type=billing.invoice.issue", ["invoice"]),
        ("q=RENDER", ["document"]),
        ("q=render+retrying", ["document"]),
        ("q=invoice", ["invoice"]),
        ("q=billing.inv", ["invoice"]),
        ("q=TASK:mail", ["mail"]),
        ("q=nowhere", []),
        ("q=render+nowhere", []),
        ("q=%25", []),
    ],
)
def test_the_list_is_searched(page, three, exports, query, names):
    """By service, type, task, error, duration, time and words, alone and together; the newest come first."""
    query = re.sub(r"TASK:(\w+)", lambda m: exports.task_id({"document": "retried"}.get(m[1], m[1])), query)

    assert [three[each] for each in found(page, query)] == names
    assert page.get(f"/api/traces?{query}").json()["total"] == len(names)


def test_the_last_minutes_are_the_last_minutes(page, exports):
    """Counted back from now."""
    roots = []
    for minutes in (90, 30, 1):
        exports.begin_ms = (datetime.now(UTC) - timedelta(minutes=minutes)).timestamp() * 1000
        roots.append(trace_id(exports.submission("a.b.c", str(minutes))))
    exports.export()

    assert found(page, "within=1h") == [roots[2], roots[1]]


def test_a_time_without_a_zone_is_the_machines_own(page, exports, monkeypatch):
    """A browser's field for date and time sends it so."""
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        root = exports.submission("a.b.c", "one")
        exports.export()

        assert found(page, "since=2026-11-28T20:50&until=2026-11-28T20:51") == [trace_id(root)]
        assert found(page, "since=2026-11-28T11:50&until=2026-11-28T11:51") == []
    finally:
        monkeypatch.undo()
        time.tzset()


def test_a_search_that_is_not_understood_is_refused_in_words(page):
    """Whoever has typed it sees what to type; a program gets JSON."""
    shown = page.get("/?min=long")
    answer = page.get("/api/traces?min=long")

    assert (shown.status_code, answer.status_code) == (422, 422)
    assert "write 250ms, 1.5s, 2m or 1h" in shown.text
    assert "write 250ms, 1.5s, 2m or 1h" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("since=0001-01-01T00:00%2B14:00", 422),
        ("since=1066-10-14T09:00", 200),
        ("until=9999-12-31T00:00Z", 200),
        ("within=" + "9" * 40 + "d", 200),
        ("min=" + "9" * 400 + "h", 200),
        ("before=nothing", 200),
    ],
)
def test_times_beyond_all_traces_are_answered(page, query, status):
    """However far: a number that does not fit is no failure of the page."""
    assert page.get(f"/api/traces?{query}").status_code == status


def test_the_page_shows_its_conditions_and_takes_each_away(page, three):
    """An address is the whole search; empty fields of the form are no conditions."""
    html = page.get("/?type=billing.invoice.issue&min=300ms&service=&error=&q=").text

    assert "1 trace<" in html
    assert 'href="/?min=300ms"' in html
    assert 'href="/?type=billing.invoice.issue"' in html
    assert 'value="300ms"' in html
    assert html.count('class="chip"') == 2


def test_long_lists_come_in_pages(page, exports):
    """Without a gap and without a repetition, although new traces come meanwhile."""
    roots = []
    for number in range(5):
        exports.begin_ms = told_spans.BEGIN_MS + number
        roots.append(trace_id(exports.submission("a.b.c", str(number))))
    exports.export()
    first = page.get("/api/traces?limit=2").json()
    exports.begin_ms += 1000
    exports.submission("a.b.c", "new")
    exports.export()

    second = page.get(f"/api/traces?limit=2&before={first['next']}").json()
    third = page.get(f"/api/traces?limit=2&before={second['next']}").json()

    seen = [item["trace_id"] for answer in (first, second, third) for item in answer["items"]]
    assert seen == list(reversed(roots))
    assert (first["total"], third["next"]) == (5, None)


def test_what_there_is_to_choose_from_is_offered(page, three):
    """Services, task types and errors that some trace has."""
    html = page.get("/").text

    assert "<option >email-worker</option>" in html
    assert '<option value="billing.document.render">' in html
    assert '<option value="store-unavailable">' in html


def test_background_work_is_left_out_of_the_page_unless_asked_for(page, exports):
    """Batches of messages are traces of their own; they would drown the requests."""
    with exports.exported():
        exports.span("gateway", "process gateway.lifecycle", start=1, end=2, kind=SpanKind.CONSUMER)
        count = {"messaging.batch.message_count": 9}
        exports.span("gateway", "publish taskmesh.lifecycle", start=1, end=2, kind=SpanKind.PRODUCER, attributes=count)

    assert "No trace yet" in page.get("/").text
    shown = page.get("/?background=true").text
    assert "process gateway.lifecycle" in shown
    assert "publish taskmesh.lifecycle" in shown


def test_a_trace_that_begins_with_its_message_is_no_background_work(page, exports):
    """A scheduled task's trace has the publishing as its root."""
    _, root = told_spans.scheduled_task(exports)
    exports.export()

    assert f"/traces/{trace_id(root)}" in page.get("/").text


def test_reads_are_left_out_of_the_page_unless_they_failed_or_are_asked_for(page, exports):
    """A program that polls would push the requests for work off the page."""
    with exports.exported():
        exports.span("gateway", "GET /v1/tasks", start=1, end=2)
        exports.span("gateway", "GET /v1/types", start=3, end=4, error="the database is away")

    shown = page.get("/").text
    assert "GET /v1/types" in shown
    assert "GET /v1/tasks" not in shown
    assert "GET /v1/tasks" in page.get("/?background=true").text


def test_what_is_no_trace_is_refused_and_other_signals_are_taken(page):
    """An exporter of metrics must not retry for ever; a broken one must hear of it."""
    assert page.post("/v1/traces", content=b"\xff").status_code == 400
    assert page.post("/v1/metrics", content=b"").status_code == 200
    assert page.get("/traces/unknown").status_code == 404
    assert page.get("/api/traces/unknown").status_code == 404


# Storage --------------------------------------------------------------------------------------------------------------


def test_the_oldest_traces_of_each_sort_go_first(page, exports, monkeypatch, tmp_path):
    """Batches and reads do not push out the requests for work; what is forgotten cannot be found by anything."""
    monkeypatch.setattr(storage, "KEPT_TRACES", 2)
    roots = []
    for number in range(3):
        exports.begin_ms = told_spans.BEGIN_MS + number * 1000
        root = exports.submission("a.b.c", str(number))
        roots.append(trace_id(root))
        told_spans.batches_of(exports, root)
        exports.span("gateway", "GET /v1/tasks", start=0, end=1)
        exports.export()

    assert found(page, "background=false") == [roots[2], roots[1]]
    assert found(page, f"q={exports.task_id('0')}") == []
    assert len(found(page)) == 6
    with sqlite3.connect(tmp_path / "traces.db") as database:
        for table, column in (("words", "trace"), ("facets", "trace")):
            [left] = database.execute(f"SELECT count(*) FROM {table} WHERE {column} NOT IN (SELECT id FROM traces)")
            assert left == (0,)
        [left] = database.execute("SELECT count(*) FROM spans WHERE trace_id NOT IN (SELECT trace_id FROM traces)")
        assert left == (0,)


def test_what_an_older_release_kept_is_forgotten(tmp_path):
    """Its tables are others; a laptop's traces are no archive."""
    with sqlite3.connect(tmp_path / "traces.db") as database:
        database.execute("CREATE TABLE traces (trace_id TEXT PRIMARY KEY, begun INTEGER)")
        database.execute("INSERT INTO traces VALUES ('a', 1)")

    page = TestClient(application(Spans(tmp_path / "traces.db")))

    assert found(page) == []


def test_a_file_of_spans_is_kept_over_a_restart(tmp_path, exports):
    """The page may be killed at any moment."""
    exports.send = lambda body: Spans(tmp_path / "other.db").add(read_spans(body))
    root = told_spans.retried_task(exports)
    exports.export()

    page = TestClient(application(Spans(tmp_path / "other.db")))

    assert found(page) == [trace_id(root)]
    assert len(page.get(f"/api/traces/{trace_id(root)}").json()["spans"]) == 15


def test_a_search_among_ten_thousand_traces_is_quick_and_reads_no_span(tmp_path):
    """Every condition is answered by an index."""
    spans = full_storage(tmp_path / "full.db")
    page = TestClient(application(spans))
    queries = ["", "service=email-worker", "error=broken", "task=" + Exports(print, seed="7").task_id("one"),
               "type=email.message.send&errors=true&min=20ms", "q=email+broken", "q=nowhere", "linked=" + "0" * 32]  # fmt: skip

    begun = time.monotonic()
    totals = [page.get(f"/api/traces?{query}").json()["total"] for query in queries]
    took = time.monotonic() - begun

    assert totals == [10_000, 10_000, 100, 100, 100, 100, 0, 0]
    assert took < 5
    with sqlite3.connect(tmp_path / "full.db") as database:
        for query in queries:
            wanted = storage.TraceQuery(**dict(part.split("=") for part in query.replace("+", " ").split("&") if part))
            where, values = wanted.condition(datetime.now(UTC))
            plan = database.execute(f"EXPLAIN QUERY PLAN SELECT count(*) FROM traces WHERE {where}", values).fetchall()
            steps = [step for *_, step in plan]
            assert not [step for step in steps if re.match(r"SCAN (spans|words|facets|links)", step)], steps


def full_storage(path):
    """10,000 traces of three spans, a hundredth of them failed."""
    spans = Spans(path)
    batch = []
    for number in range(100):
        exports = Exports(lambda body: batch.extend(read_spans(body)), seed=str(number))
        for each in range(100):
            exports.begin_ms = told_spans.BEGIN_MS + number * 100_000 + each * 1000
            root = exports.span("gateway", "POST /v1/tasks", start=0, end=5, kind=SpanKind.SERVER)
            error = "Broken" if each == 0 else None
            outcome = "failed" if error else "succeeded"
            exports.attempt(
                "email-worker", "email.message.send", "one", root, due=5, start=20, end=50, error=error, outcome=outcome
            )
        exports.export()
        if len(batch) > 4000:
            spans.add(batch)
            batch.clear()
    spans.add(batch)
    return spans
