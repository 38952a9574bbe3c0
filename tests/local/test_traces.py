"""The trace page: OTLP in, waterfalls and a JSON API out."""

from __future__ import annotations

import re

import pytest
from fastapi.testclient import TestClient
from opentelemetry.trace import SpanKind

import told_spans
from taskmesh_local.traces import application
from told_spans import span_id, trace_id


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


def test_where_no_span_tells_of_waiting_the_page_tells_of_none(page, exports):
    """Unknown is not nothing."""
    attributes = {"taskmesh.task.id": "a", "taskmesh.outcome": "succeeded"}
    with exports.exported():
        root = exports.span("gateway", "POST /v1/tasks", start=0, end=10)
        exports.span("w", "process a.b.c", root, start=50, end=60, kind=SpanKind.CONSUMER, attributes=attributes)

    html = page.get(f"/traces/{trace_id(root)}").text

    assert "Running" in html
    assert "Waiting" not in html
    assert "waited 0" not in html


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
