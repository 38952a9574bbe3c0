"""What a person sees of a task in its trace: the whole tree of spans that real processes have exported."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

import httpx

from taskmesh.testing.otlp import Span
from taskmesh.testing.waiting import eventually

from .conftest import Traced

IMMEDIATE = """
    gateway: POST /v1/tasks
      gateway: ledger transaction
      gateway: publish taskmesh.commands
      orders-worker: process orders.order.place #1 succeeded
        orders-worker: effect transaction committed
"""


def named(spans: Sequence[Span], name: str) -> list[Span]:
    """In the order of their beginning."""
    return sorted((span for span in spans if span.name == name), key=lambda span: span.start_nanoseconds)


def relations(span: Span) -> dict[str, str]:
    """Where a span's links lead, by what they say: trace and span."""
    return {str(link.attributes["taskmesh.link"]): f"{link.trace_id}-{link.span_id}" for link in span.links}


def place_of(span: Span) -> str:
    return f"{span.trace_id}-{span.span_id}"


def test_an_immediate_task_is_part_of_its_request(traced: Traced) -> None:
    """One trace, and the time that the task waited where is on its span."""
    task_id, trace_id = traced.submit("orders.order.place", {"name": "now"})

    spans = traced.shows(trace_id, IMMEDIATE)

    [process] = named(spans, "process orders.order.place")
    [publish] = named(spans, "publish taskmesh.commands")
    assert traced.trace_of(task_id) == trace_id
    waits = [process.attributes[f"taskmesh.{place}.dwell_ms"] for place in ("outbox", "broker", "prefetch")]
    assert all(wait >= 0 for wait in waits)
    assert [event["name"] for event in process.events] == ["due", "published", "received"]
    times = [event["at_nanoseconds"] for event in process.events]
    assert times == sorted(times)
    assert times[-1] <= process.start_nanoseconds
    assert sum(waits) * 1e6 <= process.start_nanoseconds - times[0] + 1e6
    assert publish.attributes["taskmesh.outbox.dwell_ms"] >= waits[0]
    assert publish.attributes["messaging.destination.name"] == "taskmesh.commands:orders.order.place"
    assert process.attributes["messaging.destination.name"] == "taskmesh.commands:orders.order.place:orders"


def test_a_scheduled_task_has_a_trace_of_its_own_linked_both_ways(traced: Traced) -> None:
    """Nobody's trace is as long as the wait."""
    task_id, asked = traced.submit("orders.order.place", {"name": "later"}, delay_seconds=1)
    executed = traced.trace_of(task_id)

    request = traced.shows(asked, "gateway: POST /v1/tasks\n  gateway: ledger transaction")
    spans = traced.shows(
        executed,
        """
        gateway: publish taskmesh.commands
          orders-worker: process orders.order.place #1 succeeded
            orders-worker: effect transaction committed
        """,
    )

    [root], [server] = named(spans, "publish taskmesh.commands"), named(request, "POST /v1/tasks")
    assert executed != asked
    assert relations(server) == {"scheduled_as": place_of(root)}
    assert relations(root) == {"scheduled_by": place_of(server)}
    assert root.start_nanoseconds - server.end_nanoseconds > 0.5e9


def test_a_task_retried_twice_shows_its_attempts_side_by_side(traced: Traced) -> None:
    """Each attempt has its number, and the reason why there had to be another one."""
    _, trace_id = traced.submit("orders.order.place", {"name": "again", "mode": "retry", "times": 2})

    traced.shows(
        trace_id,
        """
        gateway: POST /v1/tasks
          gateway: ledger transaction
          gateway: publish taskmesh.commands
          orders-worker: process orders.order.place #1 retrying !celery.exceptions.Retry
            orders-worker: effect transaction committed
          orders-worker: process orders.order.place #2 retrying after retry !celery.exceptions.Retry
            orders-worker: effect transaction committed
          orders-worker: process orders.order.place #3 succeeded after retry
            orders-worker: effect transaction committed
          orders-worker: publish taskmesh.direct
          orders-worker: publish taskmesh.direct
        """,
    )


def test_a_task_that_fails_for_good_ends_with_a_failed_attempt(traced: Traced) -> None:
    """The span says which kind of error it was, and not its text."""
    _, trace_id = traced.submit("orders.order.place", {"name": "never", "mode": "permanent"})

    spans = traced.shows(
        trace_id,
        """
        gateway: POST /v1/tasks
          gateway: ledger transaction
          gateway: publish taskmesh.commands
          orders-worker: process orders.order.place #1 failed !taskmesh.errors.PermanentError
            orders-worker: effect transaction committed
        """,
    )

    [attempt] = named(spans, "process orders.order.place")
    assert (attempt.failed, attempt.message) == (True, "rejected")
    assert "no such product" not in str(spans)


def test_a_cancelled_task_shows_who_ended_it(traced: Traced) -> None:
    """The cancellation is a request of its own, which reaches the service in a message."""
    task_id, trace_id = traced.submit("orders.cancel.loop")
    eventually(lambda: (task := traced.gateway.task(task_id)) and task["state"] == "running")

    answer = traced.http.post(f"/v1/tasks/{task_id}:cancel", json={}, headers={"Prefer": "wait=20"})

    assert answer.json()["outcome"] == "cancelled", answer.text
    traced.shows(
        trace_id,
        """
        gateway: POST /v1/tasks
          gateway: ledger transaction
          gateway: publish taskmesh.commands
          orders-worker: process orders.cancel.loop #1 cancelled
            orders-worker: effect transaction committed
        """,
    )
    traced.shows(
        answer.headers["Taskmesh-Trace-Id"],
        """
        gateway: POST /v1/tasks/{task_id}:cancel
          gateway: ledger transaction
          gateway: publish taskmesh.direct
        """,
    )


def test_each_fire_of_a_schedule_has_a_trace_linked_to_the_one_that_made_it(traced: Traced) -> None:
    """A schedule that fires every second is no trace that never ends."""
    made = traced.http.post(
        "/v1/schedules",
        json={
            "name": f"every second {uuid4()}",
            "type": "orders.order.place",
            "payload": {"name": "on time"},
            "interval_seconds": 1,
        },
    )
    assert made.status_code == httpx.codes.CREATED, made.text
    schedule_id = made.json()["id"]

    def fired() -> list[dict[str, Any]]:
        return traced.gateway.rows("select * from tasks where schedule_id = %s order by created_at", schedule_id)

    tasks = eventually(lambda: len(fired()) >= 2 and fired()[:2])
    traced.http.delete(f"/v1/schedules/{schedule_id}")

    [server] = eventually(lambda: named(traced.spans(made.headers["Taskmesh-Trace-Id"]), "POST /v1/schedules"))
    assert len({task["trace_id"] for task in tasks}) == 2
    for task in tasks:
        spans = traced.shows(
            task["trace_id"],
            """
            gateway: fire schedule
              gateway: publish taskmesh.commands
              orders-worker: process orders.order.place #1 succeeded
                orders-worker: effect transaction committed
            """,
        )
        [fire] = named(spans, "fire schedule")
        assert relations(fire) == {"schedule_of": place_of(server)}


def test_a_replayed_dead_letter_has_a_trace_linked_to_the_request_and_to_the_old_task(traced: Traced) -> None:
    """The old attempt, the person who replayed it and the new attempt can be reached from each other."""
    task_id, old = traced.submit("orders.attempts.rejects", {"way": "park"})
    letter = eventually(lambda: next(iter(traced.gateway.letters(task_id)), None))

    answer = traced.http.post(f"/v1/dead-letters/{letter['id']}:replay", json={"payload": {"way": "well"}})

    assert answer.status_code == httpx.codes.ACCEPTED, answer.text
    new = traced.trace_of(answer.json()["task"]["id"])
    before = traced.shows(
        old,
        """
        gateway: POST /v1/tasks
          gateway: ledger transaction
          gateway: publish taskmesh.commands
          orders-worker: process orders.attempts.rejects #1 dead-lettered !taskmesh.errors.PermanentError
            orders-worker: effect transaction committed
        """,
    )
    request = traced.shows(
        answer.headers["Taskmesh-Trace-Id"],
        """
        gateway: POST /v1/dead-letters/{letter_id}:replay
          gateway: ledger transaction
        """,
    )
    after = traced.shows(
        new,
        """
        gateway: publish taskmesh.commands
          orders-worker: process orders.attempts.rejects #1 succeeded
            orders-worker: effect transaction committed
        """,
    )
    [root], [server] = named(after, "publish taskmesh.commands"), [span for span in request if not span.parent_id]
    [submission] = named(before, "POST /v1/tasks")
    assert relations(server) == {"replayed_as": place_of(root)}
    assert relations(root) == {"replayed_by": place_of(server), "replay_of": place_of(submission)}


def test_a_task_that_is_tried_again_has_a_trace_linked_to_the_first_one(traced: Traced) -> None:
    """So has a task that a person retries."""
    task_id, old = traced.submit("orders.order.place", {"name": "once more", "mode": "permanent"})
    traced.gateway.outcome(task_id)

    answer = traced.http.post(f"/v1/tasks/{task_id}:retry", json={"payload": {"name": "once more"}})

    assert answer.status_code == httpx.codes.ACCEPTED, answer.text
    new = traced.trace_of(answer.json()["id"])
    after = traced.shows(
        new,
        """
        gateway: publish taskmesh.commands
          orders-worker: process orders.order.place #1 succeeded
            orders-worker: effect transaction committed
        """,
    )
    [root] = named(after, "publish taskmesh.commands")
    [submission] = named(traced.spans(old), "POST /v1/tasks")
    [server] = eventually(
        lambda: [span for span in traced.spans(answer.headers["Taskmesh-Trace-Id"]) if not span.parent_id]
    )
    assert relations(server) == {"retried_as": place_of(root)}
    assert relations(root) == {"retried_by": place_of(server), "retry_of": place_of(submission)}


def test_a_retry_that_waits_for_an_hour_begins_a_trace_linked_to_its_attempt(traced: Traced) -> None:
    """The attempt that asked for it and the one that comes of it know each other."""
    task_id, trace_id = traced.submit("orders.cancel.later")
    spans = traced.shows(
        trace_id,
        """
        gateway: POST /v1/tasks
          gateway: ledger transaction
          gateway: publish taskmesh.commands
          orders-worker: process orders.cancel.later #1 retrying !celery.exceptions.Retry
            orders-worker: effect transaction committed
        """,
    )
    [attempt] = named(spans, "process orders.cancel.later")
    [later] = [link for link in attempt.links if link.attributes["taskmesh.link"] == "retried_as"]

    # An hour later:
    traced.orders.rows("update outbox set due_at = now() where task_id = %s returning id", task_id)

    again = traced.shows(
        later.trace_id,
        """
        orders-worker: publish taskmesh.direct
          orders-worker: process orders.cancel.later #2 retrying after retry !celery.exceptions.Retry
            orders-worker: effect transaction committed
        """,
    )
    [root] = named(again, "publish taskmesh.direct")
    assert place_of(root) == f"{later.trace_id}-{later.span_id}"
    assert relations(root) == {"retried_by": place_of(attempt)}
    traced.http.post(f"/v1/tasks/{task_id}:cancel", json={})


def test_an_event_with_two_listeners_is_published_once_and_handled_twice(traced: Traced) -> None:
    """One producer span, and one consumer span for each service that listens."""
    _, trace_id = traced.submit("orders.order.place", {"name": "tell", "mode": "emit"})

    traced.shows(
        trace_id,
        """
        gateway: POST /v1/tasks
          gateway: ledger transaction
          gateway: publish taskmesh.commands
          orders-worker: process orders.order.place #1 succeeded
            audits-worker: process orders.order.placed #1 succeeded
              audits-worker: effect transaction committed
            orders-worker: effect transaction committed
            orders-worker: process orders.order.placed #1 succeeded
              orders-worker: effect transaction committed
            orders-worker: publish taskmesh.events
        """,
    )


def test_ten_tasks_of_one_request_are_ten_branches_of_its_trace(traced: Traced) -> None:
    """They are committed in one transaction."""
    tasks = [{"type": "orders.order.place", "payload": {"name": f"{number} of ten"}} for number in range(10)]

    answer = traced.http.post("/v1/tasks:batchCreate", json={"tasks": tasks})

    assert answer.is_success, answer.text
    branch = "\n".join(
        "  orders-worker: process orders.order.place #1 succeeded\n    orders-worker: effect transaction committed"
        for _ in range(10)
    )
    publish = "\n".join("  gateway: publish taskmesh.commands" for _ in range(10))
    traced.shows(
        answer.headers["Taskmesh-Trace-Id"],
        f"gateway: POST /v1/tasks:batchCreate\n  gateway: ledger transaction\n{publish}\n{branch}",
    )


def test_a_killed_worker_leaves_no_broken_trace(traced: Traced) -> None:
    """Its span went with it; the next attempt says why there was another one."""
    _, trace_id = traced.submit("orders.order.place", {"name": "killed", "mode": "crash_before"})

    spans = traced.shows(
        trace_id,
        """
        gateway: POST /v1/tasks
          gateway: ledger transaction
          gateway: publish taskmesh.commands
          orders-worker: process orders.order.place #2 succeeded after worker_lost
            orders-worker: effect transaction committed
        """,
    )

    [attempt] = named(spans, "process orders.order.place")
    assert attempt.attributes["taskmesh.task.redeliveries"] == 1


def test_a_broker_that_is_down_for_five_seconds_shows_as_a_long_publish(traced: Traced) -> None:
    """The request is answered at once, and its trace tells where the task waited."""
    traced.broker.refuse()
    threading.Timer(5, traced.broker.accept).start()

    _, trace_id = traced.submit("orders.order.place", {"name": "patience"})

    spans = traced.shows(trace_id, IMMEDIATE)
    [publish] = named(spans, "publish taskmesh.commands")
    assert publish.attributes["taskmesh.outbox.dwell_ms"] > 3_000


def test_a_batch_of_reports_links_to_the_traces_of_its_tasks(traced: Traced) -> None:
    """It belongs to none of them: neither the relay's message nor the projector's transaction."""
    _, trace_id = traced.submit("orders.order.place", {"name": "reported"})
    traced.shows(trace_id, IMMEDIATE)

    for name in ("publish taskmesh.lifecycle", "process gateway.lifecycle"):
        [batch, *_] = eventually(
            lambda name=name: [
                span for span in traced.sink.spans
                if span.name == name and trace_id in {link.trace_id for link in span.links}
            ]
        )  # fmt: skip
        assert batch.parent_id == ""
        assert batch.attributes["messaging.batch.message_count"] >= 1


def test_a_trace_that_is_not_sampled_still_shows_its_failed_attempt(traced: Traced) -> None:
    """Whoever looks for a failure finds it at any sampling rate."""
    trace_id = uuid4().hex
    unsampled = {"traceparent": f"00-{trace_id}-{uuid4().hex[:16]}-00"}

    for mode in ("well", "permanent"):
        answer = traced.http.post(
            "/v1/tasks", json={"type": "orders.order.place", "payload": {"name": mode, "mode": mode}}, headers=unsampled
        )
        assert answer.headers["Taskmesh-Trace-Id"] == trace_id
        traced.gateway.outcome(answer.json()["id"])

    spans = traced.shows(
        trace_id, "orders-worker: process orders.order.place #1 failed !taskmesh.errors.PermanentError orphan"
    )
    assert spans[0].attributes["taskmesh.sampled_late"] is True


def test_a_worker_that_is_stopped_exports_all_it_has_recorded(traced: Traced) -> None:
    """A warm shutdown loses no span."""
    _, trace_id = traced.submit("orders.order.place", {"name": "last orders", "mode": "slow"})
    worker = traced.orders.processes["worker"]

    os.kill(worker.pid, signal.SIGTERM)
    worker.wait(timeout=60)
    traced.orders.start("worker")

    traced.shows(trace_id, IMMEDIATE)
