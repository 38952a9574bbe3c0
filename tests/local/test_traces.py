"""The trace page: OTLP in, waterfalls and a JSON API out."""

from __future__ import annotations

import gzip
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
from told_spans import Exports, span_id, trace_id


@pytest.fixture
def spans(tmp_path):
    return Spans(tmp_path / "traces.db")


@pytest.fixture
def page(spans):
    return TestClient(application(spans, lambda: "http://gateway.test"))


@pytest.fixture
def exports(page):
    """Services whose spans go to the page, gzipped as exporters send them."""

    def send(body):
        headers = {"content-type": "application/x-protobuf", "content-encoding": "gzip"}
        assert page.post("/v1/traces", content=gzip.compress(body), headers=headers).status_code == 200

    return Exports(send)


def summary(page, name):
    return page.get(f"/api/traces/{name}").json()


def found(page, query=""):
    return [item["trace_id"] for item in page.get(f"/api/traces?{query}").json()["items"]]


# The waterfall --------------------------------------------------------------------------------------------------------


def test_a_trace_of_two_services_is_one_tree_in_the_order_of_the_work(page, exports):
    """Each span stands behind its parent, whatever order the services exported in."""
    with exports.exported():
        root = exports.span("gateway", "POST /v1/tasks", start=0, end=10, kind=SpanKind.SERVER)
        publish = exports.span("gateway", "publish", root, start=12, end=14, kind=SpanKind.PRODUCER)
        work = exports.span(
            "billing-worker", "process billing.invoice.issue", publish, start=20, end=100, kind=SpanKind.CONSUMER
        )
        exports.span("billing-worker", "render", work, start=30, end=60, error="no <font>")

    shown = summary(page, trace_id(root))

    assert [(s["name"], s["depth"], s["start_ms"], s["duration_ms"]) for s in shown["spans"]] == [
        ("POST /v1/tasks", 0, 0, 10),
        ("publish", 1, 12, 2),
        ("process billing.invoice.issue", 2, 20, 80),
        ("render", 3, 30, 30),
    ]
    assert shown["services"] == ["gateway", "billing-worker"]
    assert (shown["name"], shown["task"], shown["duration_ms"]) == ("POST /v1/tasks", "billing.invoice.issue", 100)
    assert (shown["errors"], shown["orphans"]) == (1, 0)


def test_the_waterfall_has_a_colour_per_service_and_errors_in_red(page, exports):
    """Positions are shares of the whole; what a span says is text."""
    with exports.exported():
        root = exports.span("gateway", "POST /v1/tasks", start=0, end=100)
        exports.span("billing-worker", "work", root, start=20, end=70)
        exports.span("email-worker", "send", root, start=80, end=90, error="<b>refused</b>")

    html = page.get(f"/traces/{trace_id(root)}").text

    assert bars(html) == [("c0", 0, 100), ("c1", 20, 50), ("failed", 80, 10)]
    assert "&lt;b&gt;refused" in html
    assert "<b>refused" not in html


def test_waiting_stands_apart_from_running_by_what_was_waited_for(page, exports):
    """Due, published, received, begun: three waits of their own before each attempt."""
    with exports.exported():
        root = exports.submission("email.message.send", "one")
        exports.attempt(
            "email-worker", "email.message.send", "one", root, due=10, start=60, end=100, outbox=20, broker=10
        )

    shown = summary(page, trace_id(root))

    [attempt] = [s for s in shown["spans"] if s["kind"] == "consumer"]
    assert waits(attempt) == [("outbox", 10, 20), ("broker", 30, 10), ("prefetch", 40, 20)]
    assert (attempt["waited_ms"], attempt["duration_ms"]) == (50, 40)
    assert (shown["waiting_ms"], shown["running_ms"], shown["duration_ms"]) == (50, 40, 100)
    html = page.get(f"/traces/{trace_id(root)}").text
    assert [each for each in bars(html) if each[0].startswith("wait")] == [
        ("wait outbox", 10, 20),
        ("wait broker", 30, 10),
        ("wait prefetch", 40, 20),
    ]
    assert all(f">{wait} wait</li>" in html for wait in ("Outbox", "Broker", "Prefetch"))


def test_the_lengths_of_waits_stand_in_for_events_that_are_missing(page, exports):
    """An exporter may drop events, and some workers may not make them yet."""
    attributes = {"taskmesh.task.id": "a", "taskmesh.prefetch.dwell_ms": 5, "taskmesh.broker.dwell_ms": 7.5}
    with exports.exported():
        root = exports.span("gateway", "POST /v1/tasks", start=0, end=10)
        exports.span("w", "process a.b.c", root, start=50, end=60, kind=SpanKind.CONSUMER, attributes=attributes)

    [_, attempt] = summary(page, trace_id(root))["spans"]

    assert waits(attempt) == [("broker", 37.5, 7.5), ("prefetch", 45, 5)]


def test_a_clock_that_is_ahead_makes_no_wait_of_negative_length(page, exports):
    """The relay's machine may say that it published after the worker's says that it received."""
    attributes = {"taskmesh.task.id": "a"}
    events = {"due": 10, "published": 30, "received": 25}
    with exports.exported():
        root = exports.span("gateway", "POST /v1/tasks", start=0, end=10)
        exports.span(
            "w", "process a.b.c", root, start=28, end=60, kind=SpanKind.CONSUMER, attributes=attributes, events=events
        )

    [_, attempt] = summary(page, trace_id(root))["spans"]

    assert waits(attempt) == [("outbox", 10, 15), ("prefetch", 25, 3)]


def test_a_trace_begins_when_its_first_task_was_due(page, exports):
    """A task of a later time waits before the first span of its trace; that is part of how long it took."""
    _, root = told_spans.scheduled_task(exports)
    exports.export()

    shown = summary(page, trace_id(root))

    assert (shown["duration_ms"], shown["spans"][0]["start_ms"]) == (77, 4)


def test_the_attempts_of_a_task_stand_side_by_side(page, exports):
    """In one row together and below it each on its own, with number, outcome, the reason, and the time between."""
    root = told_spans.retried_task(exports)
    exports.export()

    shown = summary(page, trace_id(root))

    [task] = shown["tasks"]
    assert (task["type"], task["state"]) == ("billing.document.render", "succeeded")
    assert [(each["number"], each["outcome"], each["reason"]) for each in task["attempts"]] == [
        (1, "retrying", ""),
        (2, "retrying", "store-unavailable"),
        (3, "succeeded", "store-unavailable"),
    ]
    assert [waits(s)[0] for s in shown["spans"] if s["kind"] == "consumer"] == [
        ("outbox", 5, 6),
        ("retry", 133, 407),
        ("retry", 741, 799),
    ]
    assert (shown["retries"], shown["state"]) == (2, "recovered")
    html = page.get(f"/traces/{trace_id(root)}").text
    assert "3 attempts" in html
    assert re.findall(r'<g class="pin (\w+)">.*?<text [^>]*>(\d)', html) == [
        ("failed", "1"),
        ("failed", "2"),
        ("c1", "3"),
    ]
    assert "after store-unavailable" in html


def test_spans_between_the_attempts_do_not_part_them(page, exports):
    """The relay's spans are siblings of the attempts; the attempts are told together all the same."""
    root = told_spans.retried_task(exports)
    exports.export()

    names = [s["name"] for s in summary(page, trace_id(root))["spans"] if s["parent_id"] == span_id(root)]

    assert names == [
        "ledger transaction",
        "publish taskmesh.commands",
        *["process billing.document.render"] * 3,
        *["publish taskmesh.direct"] * 2,
    ]


@pytest.mark.parametrize(
    ("outcomes", "state"),
    [
        (["succeeded"], "succeeded"),
        (["cancelled"], "cancelled"),
        ([], ""),
        (["retrying", "succeeded"], "recovered"),
        (["retrying", "failed"], "failed"),
        (["retrying"], "retrying"),
        (["dead-lettered", "duplicate"], "failed"),
    ],
)
def test_a_trace_is_as_good_as_the_last_attempt_of_each_task(page, exports, outcomes, state):
    """A delivery of what is settled already says nothing; a failure that a retry made good is no failure."""
    with exports.exported():
        root = exports.submission("a.b.c", "one")
        for number, outcome in enumerate(outcomes, 1):
            error = None if outcome in {"succeeded", "cancelled", "duplicate"} else "Broken"
            exports.attempt(
                "a-worker", "a.b.c", "one", root, due=number * 100, start=number * 100 + 20, end=number * 100 + 30,
                number=1 if outcome == "duplicate" else number, outcome=outcome, error=error,
            )  # fmt: skip

    assert summary(page, trace_id(root))["state"] == state


def test_a_span_exported_twice_counts_once(page, exports):
    """An exporter that lost our answer sends again."""
    bodies = []
    exports.send = bodies.append
    root = exports.span("gateway", "GET /v1/types", start=1, end=2)
    exports.export()

    for _ in range(2):
        page.post("/v1/traces", content=bodies[0])

    assert [trace["spans"] for trace in page.get("/api/traces").json()["items"]] == [1]
    assert found(page, f"q={trace_id(root)[:12]}") == [trace_id(root)]


def test_a_span_whose_parent_never_came_is_marked(page, exports):
    """A hole in a trace must be seen, not hidden by drawing around it."""
    root = orphan(exports)

    [trace] = page.get("/api/traces").json()["items"]

    assert trace["orphans"] == 1
    assert "parent missing" in page.get(f"/traces/{trace_id(root)}").text
    assert "1 without parent" in page.get("/").text


def test_an_attempt_that_was_sampled_late_is_marked_and_is_no_orphan(page, exports):
    """Its parent was dropped by the sampler, so nothing is missing."""
    lost = exports.span("gateway", "lost", start=1, end=9)
    exports.send, send = lambda _: None, exports.send
    exports.export()
    exports.send = send
    with exports.exported():
        exports.attempt(
            "w", "a.b.c", "one", lost, due=10, start=30, end=40, outcome="failed", error="Broken", late=True
        )

    trace = summary(page, trace_id(lost))

    assert (trace["orphans"], trace["late"], trace["spans"][0]["sampled_late"]) == (0, 1, True)
    html = page.get(f"/traces/{trace_id(lost)}").text
    assert "sampled late" in html
    assert "parent missing" not in html


def test_a_task_that_runs_in_another_trace_is_told_too(page, exports):
    """The request for it names it; here there is no attempt."""
    server, _ = told_spans.scheduled_task(exports)
    exports.export()

    [task] = summary(page, trace_id(server))["tasks"]

    assert (task["type"], task["id"], task["attempts"]) == ("email.message.send", exports.task_id("scheduled"), [])
    assert "not attempted in this trace" in page.get(f"/traces/{trace_id(server)}").text


def test_a_task_leads_to_the_gateway_and_to_its_explanation(page, exports):
    """Its address in the API, its id and the command to copy."""
    root = told_spans.retried_task(exports)
    exports.export()
    task = exports.task_id("retried")

    html = page.get(f"/traces/{trace_id(root)}").text

    assert f'href="http://gateway.test/v1/tasks/{task}"' in html
    assert f'data-copy="{task}"' in html
    assert f'data-copy="taskmesh explain {task}"' in html


def test_a_page_without_a_gateway_has_no_link_to_one(spans, exports):
    """It may be asked before the gateway is up."""
    root = told_spans.retried_task(exports)
    exports.export()

    assert "/v1/tasks/" not in TestClient(application(spans)).get(f"/traces/{trace_id(root)}").text


def test_the_details_of_a_span_are_a_page_of_their_own(page, exports):
    """Attributes, events, the process: 1,000 of them would be too much for the page of the trace."""
    root = told_spans.retried_task(exports)
    exports.export()
    [first, *_] = [s for s in summary(page, trace_id(root))["spans"] if s["kind"] == "consumer"]
    whole = page.get(f"/traces/{trace_id(root)}").text

    details = page.get(f"/traces/{trace_id(root)}/spans/{first['span_id']}").text

    for text in ("billing_worker.errors.StoreUnavailable", "messaging.rabbitmq.destination.routing_key", "laptop:"):
        assert text in details
        assert text not in whole
    assert page.get(f"/traces/{trace_id(root)}/spans/0000000000000000").status_code == 404


# Links ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of_new", "at_old"), [("scheduled_by", "scheduled_as"), ("replay_of", "replayed_as"), ("retry_of", "retried_as")]
)
def test_linked_traces_lead_to_each_other_although_one_end_has_made_the_link(page, exports, of_new, at_old):
    """The older span had ended when the newer one began, so it could not know of it."""
    with exports.exported():
        old = exports.submission("a.b.c", "one", due=1000)
        new = exports.publish("gateway", "taskmesh.commands", None, start=1000, task="one", links=[(old, of_new)])

    [back] = summary(page, trace_id(new))["links"]
    [forth] = summary(page, trace_id(old))["links"]

    assert (back["relation"], back["trace_id"], back["span_id"]) == (of_new, trace_id(old), span_id(new))
    assert (forth["relation"], forth["trace_id"], forth["span_id"]) == (at_old, trace_id(new), span_id(old))
    assert forth["trace"]["name"] == "publish taskmesh.commands"
    assert f'href="/traces/{trace_id(new)}"' in page.get(f"/traces/{trace_id(old)}").text
    assert f'href="/traces/{trace_id(old)}"' in page.get(f"/traces/{trace_id(new)}").text
    assert f'href="/traces/{trace_id(old)}"' in page.get(f"/traces/{trace_id(new)}/spans/{span_id(new)}").text


def test_a_link_that_both_ends_have_made_is_told_once(page, exports):
    """From either end there is one other trace."""
    with exports.exported():
        new = exports.publish("gateway", "taskmesh.commands", None, start=1000, task="one")
        old = exports.submission("a.b.c", "one", links=[(new, "scheduled_as")], due=1000)
        exports.attempt("w", "a.b.c", "one", new, due=1000, start=1010, end=1020, links=[(old, "scheduled_by")])

    assert [tie["relation"] for tie in summary(page, trace_id(old))["links"]] == ["scheduled_as"]
    assert [tie["relation"] for tie in summary(page, trace_id(new))["links"]] == ["scheduled_by"]


def test_a_fire_leads_to_the_request_that_made_its_schedule_and_back(page, exports):
    """However often it has fired."""
    with exports.exported():
        made = exports.span("gateway", "POST /v1/schedules", start=0, end=5, kind=SpanKind.SERVER)
        fires = [
            exports.span("gateway", "fire schedule", start=60 * n, end=60 * n + 5, links=[(made, "schedule_of")])
            for n in (1, 2)
        ]

    assert [tie["relation"] for tie in summary(page, trace_id(fires[0]))["links"]] == ["schedule_of"]
    assert [tie["trace_id"] for tie in summary(page, trace_id(made))["links"]] == [trace_id(each) for each in fires]


def test_a_link_to_a_trace_that_has_not_come_is_told(page, exports):
    """It may be sampled away, or forgotten."""
    old = exports.span("gateway", "POST /v1/tasks", start=0, end=5)
    exports.send, send = lambda _: None, exports.send
    exports.export()
    exports.send = send
    with exports.exported():
        new = exports.publish("gateway", "taskmesh.commands", None, start=9, task="one", links=[(old, "replay_of")])

    [tie] = summary(page, trace_id(new))["links"]

    assert (tie["trace_id"], tie["trace"]) == (trace_id(old), None)
    assert "of which no span has come" in page.get(f"/traces/{trace_id(new)}").text


def test_batches_are_reached_from_the_trace_and_the_span_that_they_link_to(page, exports):
    """They belong to no one request, so the page lists them on demand."""
    root = told_spans.fan_out(exports)
    relay, projector = told_spans.batches_of(exports, root)
    exports.export()

    html = page.get(f"/traces/{trace_id(root)}").text

    both = [trace_id(projector), trace_id(relay)]
    assert f"/?linked={trace_id(root)}&amp;background=true" in html
    assert found(page, f"linked={trace_id(root)}") == both
    assert found(page, f"linked={trace_id(root)}&span={span_id(root)}") == both
    assert found(page, f"linked={trace_id(root)}&span=0000000000000000") == []
    assert f"span={span_id(root)}&amp;" in page.get(f"/traces/{trace_id(root)}/spans/{span_id(root)}").text
    assert [tie["trace_id"] for tie in summary(page, trace_id(root))["batches"]] == list(reversed(both))
    assert summary(page, trace_id(root))["links"] == []
    assert [tie["trace_id"] for tie in summary(page, trace_id(relay))["links"]] == [trace_id(root)]


# The list and its search ----------------------------------------------------------------------------------------------


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
    assert len(summary(page, trace_id(root))["spans"]) == 15


def test_a_search_among_ten_thousand_traces_is_quick_and_reads_no_span(tmp_path):
    """Every condition is answered by an index."""
    spans = full_storage(tmp_path / "full.db")
    page = TestClient(application(spans))
    queries = ["", "service=email-worker", "error=broken", "task=" + Exports(print, seed="7").task_id("one"),
               "type=email.message.send&errors=true&min=20ms", "q=email+broken", "q=nowhere"]  # fmt: skip

    begun = time.monotonic()
    totals = [page.get(f"/api/traces?{query}").json()["total"] for query in queries]
    took = time.monotonic() - begun

    assert totals == [10_000, 10_000, 100, 100, 100, 100, 0]
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


def orphan(exports):
    """A span whose parent's process was killed before it exported."""
    lost = exports.span("gateway", "lost", start=1, end=9)
    exports.send, send = lambda _: None, exports.send
    exports.export()
    exports.send = send
    with exports.exported():
        exports.span("gateway", "child", lost, start=2, end=3)
    return lost


def waits(span):
    return [(wait["kind"], wait["start_ms"], wait["duration_ms"]) for wait in span["waits"]]


def bars(html):
    """Class, beginning and length in percent of everything that is drawn in the lanes."""
    lanes = "".join(re.findall(r'<span class="lane".*?</svg>', html, re.DOTALL))
    found = re.findall(r'<rect class="([\w ]+)" x="([\d.]+)%" width="([\d.]+)%"', lanes)
    return [(name, float(x), float(width)) for name, x, width in found]
