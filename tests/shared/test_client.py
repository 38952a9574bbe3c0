"""The Python client against a gateway that follows a script; every test but the last few runs in both forms."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import socket
import threading
import time
from contextvars import copy_context
from datetime import UTC, datetime, timedelta, timezone
from email.utils import format_datetime

import pytest
from opentelemetry.sdk.trace import TracerProvider

from taskmesh import client
from taskmesh.client import AsyncTaskmesh, Submission, Taskmesh
from taskmesh.client.exchange import Patience
from taskmesh.client.streaming import EventParser
from taskmesh.contracts.billing import IssueInvoice

INVOICE = {
    "buyer": {"name": "Ada", "address": ["1 Row"], "country": "DE", "email": "ada@example.com"},
    "currency": "EUR",
    "lines": [{"description": "Work", "unit_price": "10.00", "tax": {"rate": "19"}}],
}


class Awaited:
    """Calls an async object as if it were a blocking one."""

    def __init__(self, target, runner):
        self._target = target
        self._runner = runner

    def __getattr__(self, name):
        attribute = getattr(self._target, name)
        if not callable(attribute):
            return Awaited(attribute, self._runner)
        return lambda *args, **kwargs: self._finish(attribute(*args, **kwargs))

    def _finish(self, outcome):
        if inspect.isawaitable(outcome):
            return self._runner.run(outcome, context=copy_context())
        return self._iterate(outcome)

    def _iterate(self, iterator):
        while True:
            try:
                yield self._runner.run(anext(iterator))
            except StopAsyncIteration:
                return


@pytest.fixture(params=["blocking", "async"])
def connect(request):
    """Makes a client, whose calls block in either form."""
    with asyncio.Runner() as runner:
        made = []

        def make(url, **options):
            patience = options.pop("patience", Patience(first_pause_seconds=0.001))
            kind = Taskmesh if request.param == "blocking" else AsyncTaskmesh
            mesh = kind(url, "key-of-ada", **options)
            mesh._patience = mesh.schedules._patience = patience
            mesh = mesh if request.param == "blocking" else Awaited(mesh, runner)
            made.append(mesh)
            return mesh

        yield make

        for mesh in made:
            mesh.close()


@pytest.fixture
def mesh(connect, gateway):
    return connect(gateway.url)


def test_a_submission_says_who_asks_and_what_for(mesh, gateway):
    gateway.will(gateway.task(status=202))

    task = mesh.submit("billing.invoice.issue", {"a": 1}, tags=["x"], priority=3, delay=timedelta(minutes=1))

    (asked,) = gateway.asked
    assert (asked.method, asked.path) == ("POST", "/v1/tasks")
    assert asked.headers["authorization"] == "Bearer key-of-ada"
    assert asked.body == {
        "type": "billing.invoice.issue",
        "payload": {"a": 1},
        "delay_seconds": 60.0,
        "priority": 3,
        "tags": ["x"],
    }
    assert str(task.id) == gateway.task_id
    assert task.state is client.TaskState.QUEUED


def test_a_contract_is_submitted_under_its_type(mesh, gateway):
    gateway.will(gateway.task(status=202))
    command = IssueInvoice.model_validate(INVOICE)

    mesh.submit(command)

    assert gateway.asked[0].body == {"type": "billing.invoice.issue", "payload": command.payload()}


def test_times_are_sent_in_utc_and_a_guess_at_the_zone_is_refused(mesh, gateway):
    gateway.will(gateway.task(status=202))
    noon_in_berlin = datetime(2026, 7, 1, 12, tzinfo=timezone(timedelta(hours=2)))

    mesh.submit("a.b", {}, run_at=noon_in_berlin)

    assert gateway.asked[0].body["run_at"] == "2026-07-01T10:00:00Z"
    with pytest.raises(ValueError, match="no time zone"):
        mesh.submit("a.b", {}, run_at=datetime(2026, 7, 1, 12))  # noqa: DTZ001


def test_one_submission_keeps_its_idempotency_key_over_retries_and_the_next_has_another(mesh, gateway):
    gateway.will(gateway.hangup(), gateway.reply(502), gateway.task(status=202))

    mesh.submit("a.b", {})
    mesh.submit("a.b", {})

    keys = [asked.headers["idempotency-key"] for asked in gateway.asked]
    assert len(keys) == 4
    assert len(set(keys[:3])) == 1
    assert keys[3] != keys[0]


def test_the_callers_own_idempotency_key_is_used(mesh, gateway):
    gateway.will(gateway.task(status=202))

    mesh.submit("a.b", {}, idempotency_key="order-7")

    assert gateway.asked[0].headers["idempotency-key"] == "order-7"


def test_a_gateway_that_asks_for_time_gets_it(mesh, gateway):
    gateway.will(gateway.problem(503, "database_unavailable", retry_after="1"), gateway.task(status=202))
    begun = time.monotonic()

    mesh.submit("a.b", {})

    assert 1 <= time.monotonic() - begun < 5


def test_a_retry_after_beyond_the_time_allowed_ends_the_call_at_once(mesh, gateway):
    later = format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)
    gateway.will(gateway.problem(503, "database_unavailable", retry_after=later))

    with pytest.raises(client.GatewayUnavailable) as caught:
        mesh.submit("a.b", {})

    assert len(gateway.asked) == 1
    assert 3500 < caught.value.retry_after_seconds <= 3600


def test_a_gateway_that_is_away_is_reported_when_the_time_is_over(connect):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # Bound but not listening: connections are refused.
        mesh = connect(
            f"http://127.0.0.1:{unused.getsockname()[1]}",
            patience=Patience(total_seconds=0.3, first_pause_seconds=0.05),
        )

        with pytest.raises(
            client.GatewayUnreachable, match=r"no answer from http://127\.0\.0\.1:\d+ after [2-9] tries"
        ):
            mesh.submit("a.b", {})


def test_a_request_that_is_not_safe_to_repeat_is_sent_once(mesh, gateway):
    gateway.will(gateway.hangup())

    with pytest.raises(client.GatewayUnreachable):
        mesh.schedules.delete(gateway.task_id)

    assert len(gateway.asked) == 1


def test_a_schedule_is_made_under_a_key_of_its_own(mesh, gateway):
    stored = {"id": gateway.task_id, "name": "nightly", "type": "a.b", "cron": "30 2 * * *"}
    gateway.will(gateway.hangup(), gateway.reply(201, stored))

    mesh.schedules.create("nightly", "a.b", {}, cron="30 2 * * *", timezone="Europe/Berlin")

    first, second = gateway.asked
    assert first.headers["idempotency-key"] == second.headers["idempotency-key"]
    assert second.body == {
        "name": "nightly",
        "type": "a.b",
        "payload": {},
        "cron": "30 2 * * *",
        "timezone": "Europe/Berlin",
    }


def test_a_refusal_is_an_exception_that_names_the_fields(mesh, gateway):
    wrong = [{"pointer": "/payload/lines/0/unit_price", "detail": "is not of type 'string'"}]
    gateway.will(gateway.problem(422, "contract_violation", errors=wrong))

    with pytest.raises(client.PayloadRefused) as caught:
        mesh.submit("a.b", {})

    problem = caught.value
    assert (problem.status, problem.code) == (422, "contract_violation")
    assert [(error.pointer, error.detail) for error in problem.errors] == [tuple(wrong[0].values())]
    assert problem.trace_id == "0af7651916cd43dd8448eb211c80319c"
    assert "/payload/lines/0/unit_price" in str(problem)
    assert len(gateway.asked) == 1


def test_an_unknown_type_comes_with_the_nearest_names(mesh, gateway):
    gateway.will(gateway.problem(404, "unknown_type", nearest=["billing.invoice.issue"]))

    with pytest.raises(client.UnknownType) as caught:
        mesh.submit("billing.invoice.isue", {})

    assert caught.value.nearest == ("billing.invoice.issue",)


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (400, "invalid_request", client.InvalidRequest),
        (401, "unauthenticated", client.Unauthenticated),
        (403, "forbidden", client.Forbidden),
        (404, "not_found", client.NoSuchResource),
        (409, "idempotency_conflict", client.IdempotencyConflict),
        (409, "conflict", client.Conflict),
        (413, "payload_too_large", client.PayloadTooLarge),
        (500, "internal", client.GatewayFault),
        (418, "of_a_later_release", client.TaskmeshProblem),
    ],
)
def test_each_problem_has_its_exception_and_is_not_retried(mesh, gateway, status, code, expected):
    gateway.will(gateway.problem(status, code))

    with pytest.raises(expected) as caught:
        mesh.get(gateway.task_id)

    assert type(caught.value) is expected
    assert len(gateway.asked) == 1


def test_an_answer_of_a_proxy_is_a_problem_too(mesh, gateway):
    gateway.will(gateway.reply(404, "<html>", Content_Type="text/html"))

    with pytest.raises(client.NoSuchResource, match="may not come from the gateway"):
        mesh.get(gateway.task_id)


def test_waiting_asks_again_until_the_task_is_finished(mesh, gateway):
    gateway.will(gateway.task("running"), gateway.task("succeeded", result={"number": "2026-1"}))

    task = mesh.wait(gateway.task_id, timeout=90)

    assert task.succeeded
    assert task.result == {"number": "2026-1"}
    assert [asked.headers["prefer"] for asked in gateway.asked] == ["wait=60", "wait=60"]


def test_waiting_that_is_over_raises_with_the_task_as_it_is(mesh, gateway):
    gateway.will(gateway.task("running"))

    with pytest.raises(client.WaitTimeout) as caught:
        mesh.wait(gateway.task_id, timeout=0.6)

    assert caught.value.task.state is client.TaskState.RUNNING


def test_a_tree_is_finished_when_all_of_its_tasks_are(mesh, gateway):
    root = gateway.task_json("succeeded")
    child = {**gateway.task_json("running"), "id": gateway.child_id, "parent_id": gateway.task_id}
    gateway.will(
        gateway.task("succeeded"),
        gateway.reply(body={"items": [child, root]}),
        gateway.reply(body={"items": [{**child, "state": "failed"}, root]}),
    )

    tasks = mesh.wait_tree(gateway.task_id, timeout=30)

    assert [(str(task.id), task.state.value) for task in tasks] == [
        (gateway.task_id, "succeeded"),
        (gateway.child_id, "failed"),
    ]
    assert gateway.asked[-1].query["root_id"] == gateway.task_id


def test_a_submission_that_waits_returns_the_finished_task(mesh, gateway):
    gateway.will(gateway.task("running", status=202), gateway.task("succeeded"))

    task = mesh.submit("a.b", {}, wait=timedelta(seconds=20))

    assert task.finished
    assert [(asked.method, asked.headers["prefer"]) for asked in gateway.asked] == [
        ("POST", "wait=20"),
        ("GET", "wait=20"),
    ]


def test_a_list_fetches_its_pages_as_they_are_needed(mesh, gateway):
    pages = [
        gateway.reply(body={"items": [gateway.task_json(), gateway.task_json()], "next_cursor": "abc"}),
        gateway.reply(body={"items": [gateway.task_json()], "next_cursor": None}),
    ]
    gateway.will(*pages)

    tasks = mesh.list(
        type="a.b", state=client.TaskState.FAILED, created_after=datetime(2026, 1, 1, tzinfo=UTC), page_size=2
    )

    assert len(list(itertools.islice(tasks, 2))) == 2
    assert len(gateway.asked) == 1
    assert len(list(tasks)) == 1
    first, second = gateway.asked
    assert first.query == {"type": "a.b", "state": "failed", "created_after": "2026-01-01T00:00:00Z", "limit": "2"}
    assert second.query == {**first.query, "cursor": "abc"}


def test_a_limited_list_asks_for_no_more_than_it_gives(mesh, gateway):
    gateway.will(gateway.reply(body={"items": [gateway.task_json()] * 3, "next_cursor": "more"}))

    assert len(list(mesh.list(limit=3))) == 3
    assert [asked.query["limit"] for asked in gateway.asked] == ["3"]


def test_a_batch_is_one_request_with_one_key(mesh, gateway):
    gateway.will(gateway.reply(202, {"items": [gateway.task_json(), gateway.task_json()]}))

    tasks = mesh.submit_many([Submission(type="a.b", payload={"n": 1}), IssueInvoice.model_validate(INVOICE)])

    assert len(tasks) == 2
    (asked,) = gateway.asked
    assert asked.path == "/v1/tasks:batchCreate"
    assert [task["type"] for task in asked.body["tasks"]] == ["a.b", "billing.invoice.issue"]
    assert asked.headers["idempotency-key"]


def test_events_go_on_behind_the_last_one_after_a_lost_connection(mesh, gateway):
    gateway.will(
        gateway.stream((1, "queued"), (2, "running"), cut=True),
        gateway.hangup(),
        gateway.problem(503, "database_unavailable"),
        gateway.stream((3, "succeeded")),
    )

    changes = list(mesh.events(gateway.task_id))

    assert [(change.seq, change.state.value) for change in changes] == [(1, "queued"), (2, "running"), (3, "succeeded")]
    assert [asked.headers.get("last-event-id") for asked in gateway.asked] == [None, "2", "2", "2"]


def test_a_stream_that_ends_before_the_task_does_is_opened_again(mesh, gateway):
    gateway.will(gateway.stream((1, "running")), gateway.stream((2, "failed")))

    assert [change.seq for change in mesh.events(gateway.task_id)] == [1, 2]


def test_a_tree_is_followed_until_its_last_task_is_finished(mesh, gateway):
    gateway.will(
        gateway.stream((1, "succeeded")),
        gateway.stream((2, "running", gateway.child_id), (3, "succeeded", gateway.child_id)),
        gateway.reply(204),
    )

    changes = list(mesh.events(gateway.task_id, tree=True))

    assert [str(change.task_id) for change in changes] == [gateway.task_id, gateway.child_id, gateway.child_id]
    assert [asked.query for asked in gateway.asked] == [{"tree": "true"}] * 3


def test_a_stream_can_be_resumed_behind_its_end(mesh, gateway):
    gateway.will(gateway.reply(204))

    assert list(mesh.events(gateway.task_id, after=9)) == []
    assert gateway.asked[0].headers["last-event-id"] == "9"


def test_a_refused_stream_raises_the_problem(mesh, gateway):
    gateway.will(gateway.problem(404, "not_found"))

    with pytest.raises(client.NoSuchResource):
        list(mesh.events(gateway.task_id))


def test_types_come_with_their_schemas(mesh, gateway):
    announced = {"type": "a.b", "service": "a", "payload_schema": {"type": "object"}, "of_a_later_release": 1}
    gateway.will(gateway.reply(body={"items": [announced]}), gateway.reply(body=announced))

    assert mesh.types() == (mesh.type("a.b"),)
    assert gateway.asked[1].path == "/v1/types/a.b"


def test_schedules_can_be_changed_paused_and_deleted(mesh, gateway):
    stored = {"id": gateway.task_id, "name": "nightly", "type": "a.b", "interval_seconds": 2.0}
    gateway.will(*[gateway.reply(body=stored)] * 4, gateway.reply(body={"items": [stored]}), gateway.reply(204))

    mesh.schedules.update(gateway.task_id, interval_seconds=2)
    mesh.schedules.pause(gateway.task_id)
    mesh.schedules.resume(gateway.task_id)
    assert mesh.schedules.get(gateway.task_id).rhythm == "every 2 s"
    assert [schedule.name for schedule in mesh.schedules.list()] == ["nightly"]
    mesh.schedules.delete(gateway.task_id)

    path = f"/v1/schedules/{gateway.task_id}"
    assert [(asked.method, asked.path) for asked in gateway.asked] == [
        ("PATCH", path),
        ("POST", f"{path}:pause"),
        ("POST", f"{path}:resume"),
        ("GET", path),
        ("GET", "/v1/schedules"),
        ("DELETE", path),
    ]


def test_the_callers_trace_is_carried_along(mesh, gateway):
    gateway.will(gateway.task())

    with TracerProvider().get_tracer("test").start_as_current_span("caller") as span:
        mesh.get(gateway.task_id)
    mesh.get(gateway.task_id)

    inside, outside = gateway.asked
    assert inside.headers["traceparent"].split("-")[1] == f"{span.get_span_context().trace_id:032x}"
    assert "traceparent" not in outside.headers


def test_threads_share_one_client(gateway):
    gateway.will(gateway.task("succeeded"))
    outcomes = []

    with Taskmesh(gateway.url, "key") as mesh:
        threads = [threading.Thread(target=lambda: outcomes.append(mesh.get(gateway.task_id))) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert len(outcomes) == 16


def test_the_environment_is_read_only_when_asked_for(monkeypatch, gateway):
    monkeypatch.setenv("TASKMESH_URL", gateway.url)
    monkeypatch.delenv("TASKMESH_API_KEY", raising=False)

    with pytest.raises(client.NotConfigured, match="TASKMESH_API_KEY is not set"):
        Taskmesh.from_env()

    monkeypatch.setenv("TASKMESH_API_KEY", "key-from-env")
    gateway.will(gateway.task())
    with Taskmesh.from_env() as mesh:
        mesh.get(gateway.task_id)
    assert gateway.asked[0].headers["authorization"] == "Bearer key-from-env"


def test_both_clients_offer_the_same():
    for blocking, awaited in [(Taskmesh, AsyncTaskmesh), *[(type(c.schedules), type(a.schedules)) for c, a in _pair()]]:
        for name, method in inspect.getmembers(blocking, inspect.isfunction):
            if name.startswith("_"):
                continue
            assert list(inspect.signature(method).parameters) == list(
                inspect.signature(getattr(awaited, name)).parameters
            )


def _pair():
    return [(Taskmesh("http://localhost", "key"), AsyncTaskmesh("http://localhost", "key"))]


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_events_are_read_from_pieces_of_any_size(size):
    text = ": hello\r\n\r\nid: 7\nevent: state\ndata: {\ndata: }\n\nretry: 5\ndata:é\n\ndata: cut sho".encode()
    parser = EventParser()

    events = [event for start in range(0, len(text), size) for event in parser.feed(text[start : start + size])]

    assert [(event.event, event.data, event.id) for event in events] == [("state", "{\n}", "7"), ("message", "é", "7")]


def test_a_cancellation_is_waited_for_by_asking_again(mesh, gateway):
    """Each answer is held for a minute at most, and the request changes nothing the second time."""
    gateway.will(
        gateway.reply(202, {"outcome": "requested", "detail": "", "task": gateway.task_json("running")}),
        gateway.reply(200, {"outcome": "already_finished", "detail": "", "task": gateway.task_json("cancelled")}),
    )

    answer = mesh.cancel(gateway.task_id, reason="a mistake", wait=90)

    assert (answer.outcome, answer.settled) == ("cancelled", True)
    assert [asked.path for asked in gateway.asked] == [f"/v1/tasks/{gateway.task_id}:cancel"] * 2
    assert (gateway.asked[0].headers["prefer"], gateway.asked[0].body) == ("wait=60", {"reason": "a mistake"})


def test_a_cancellation_that_nobody_waits_for_is_asked_for_once(mesh, gateway):
    gateway.will(gateway.reply(202, {"outcome": "requested", "detail": "", "task": gateway.task_json("running")}))

    answer = mesh.cancel(gateway.task_id, force=True)

    (asked,) = gateway.asked
    assert (answer.outcome, asked.body, "prefer" in asked.headers) == ("requested", {"force": True}, False)


def test_a_retry_that_got_no_answer_is_repeated_under_its_key(mesh, gateway):
    gateway.will(gateway.hangup(), gateway.task(status=202, retry_of=gateway.child_id))

    task = mesh.retry(gateway.child_id, payload={"n": 1})

    assert str(task.retry_of) == gateway.child_id
    first, second = gateway.asked
    assert first.headers["idempotency-key"] == second.headers["idempotency-key"]
    assert second.body == {"payload": {"n": 1}}
